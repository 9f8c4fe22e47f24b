"""Whether a model, its guide and the data fit each other: names, shapes, spaces and supports."""

from typing import Any

from torch.distributions import TransformedDistribution

from pyro_vae.inference.handlers import Site, Trace, latent_sites

__all__ = ["check_match", "check_observed", "kind_of"]


def check_match(model_trace: Trace, guide_trace: Trace, *, sums: bool) -> None:
    """Refuse latents of one program alone, of different shapes, or on different spaces.

    Args:
        model_trace: Trace of the model.
        guide_trace: Trace of the guide.
        sums: Let the model have latents of its own that are marked for enumeration.

    Raises:
        ValueError: They do not match; the message names the site.
    """
    in_model = dict(latent_sites(model_trace))
    in_guide = dict(latent_sites(guide_trace))
    for name, site in in_model.items():
        if name not in in_guide and site["infer"].get("enumerate") == "parallel":
            if sums:
                continue
            raise ValueError(
                f"site {name!r} is marked for enumeration and the guide does not draw it: it is to "
                "be summed out, which loss=TraceEnum_ELBO(max_plate_nesting=1) does, and "
                "log_evidence."
            )
        if name not in in_guide:
            raise ValueError(
                f"the guide has no latent site {name!r}, which the model draws; the guide draws "
                f"{sorted(in_guide) or 'nothing'}. Give latent sites equal names in both."
            )
        expected, given = tuple(site["fn"].shape()), tuple(in_guide[name]["value"].shape)
        if _without_leading_ones(expected) != _without_leading_ones(given):
            raise ValueError(
                f"site {name!r}: the guide draws values of shape {given}, but the model expects "
                f"{expected} (batch shape {tuple(site['fn'].batch_shape)}, event shape "
                f"{tuple(site['fn'].event_shape)}). Make the encoder's output and the prior agree."
            )
        _check_space(name, site["fn"], in_guide[name])
    for name, site in in_guide.items():
        if name not in in_model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide draws the latent site {name!r}, which the model does not have; the "
                f"model draws {sorted(in_model) or 'nothing'}. Give latent sites equal names in "
                "both, or mark it with infer={'is_auxiliary': True}."
            )


def _check_space(name: str, prior: Any, drawn: Site) -> None:
    """Refuse a prior and a guide on different spaces, such as a sphere and a plane."""
    validated = getattr(prior, "_validate_args", False)
    if validated is None:  # expanding some of Pyro's distributions forgets it
        validated = type(prior)._validate_args
    if not validated or kind_of(prior) == "Delta":
        return
    value = drawn["value"]
    try:
        outside = ~prior.support.check(value)
    except NotImplementedError:  # a distribution that does not say
        return
    if outside.any():
        raise ValueError(
            f"site {name!r}: {int(outside.sum())} of {outside.numel()} values that the guide draws "
            f"({kind_of(drawn['fn'])}) lie outside the support {prior.support} of the model's "
            f"{kind_of(prior)}; choose a prior and a guide on the same space."
        )
    # Bits and directions are real numbers too, but no density of these is one of those.
    guide = drawn["fn"]
    measures = _measure(guide), _measure(prior)
    if None not in measures and measures[0] != measures[1]:
        raise ValueError(
            f"site {name!r}: the guide's {kind_of(guide)} is over {guide.support}, the model's "
            f"{kind_of(prior)} over {prior.support}: no ratio of such densities is a weight; "
            "choose a prior and a guide on the same space."
        )


def _measure(fn: Any) -> tuple[bool, str] | None:
    """Whether values are counted, and the surface that they lie on, if any; None if unknown."""
    try:
        support = fn.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        surface = type(support).__name__ if support.event_dim else ""
        return None if kind_of(fn) == "Delta" else (support.is_discrete, surface)
    except NotImplementedError:
        return None


def check_observed(name: str, site: Site) -> None:
    """Refuse observed values of another shape, or outside the support of their distribution.

    Raises:
        ValueError: The message names the site.
    """
    fn, value = site["fn"], site["value"]
    expected = tuple(fn.shape())
    if fn.event_shape != value.shape[value.dim() - fn.event_dim :]:
        raise ValueError(
            f"site {name!r}: the observed value has shape {tuple(value.shape)}, but its "
            f"distribution is over {expected}. Make the decoder's output as wide as the data."
        )
    if site["mask"] is not None or not getattr(fn, "_validate_args", False):
        return
    if hasattr(fn, "filled"):  # what a likelihood knows to be missing may be anything
        value = fn.filled(value)
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"site {name!r}: the observed value has NaN or infinite entries.")
    try:
        inside = fn.support.check(value)
    except NotImplementedError:  # a distribution that does not say
        return
    if not inside.all():
        raise ValueError(
            f"site {name!r}: {int((~inside).sum())} of {inside.numel()} observed data have values "
            f"outside the support {fn.support} of {kind_of(fn)}; they range from "
            f"{value.min().item():g} to {value.max().item():g}. Use a likelihood that is a density "
            "for such data, or prepare the data (binarize, dequantize). Under "
            "pyro.validation_enabled(False) they are scored all the same, but not by log p(x)."
        )


def kind_of(fn: Any) -> str:
    """The name of a distribution's class, under independent dimensions and masks."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
