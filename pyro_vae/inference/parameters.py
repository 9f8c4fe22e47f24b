"""The parameters of a pair, wherever they live: in modules, or in Pyro's parameter store."""

from typing import Any

from torch import Tensor, nn

from pyro_vae.context import bare, modules_of
from pyro_vae.inference.handlers import Program, Trace

__all__ = ["Parameters"]


class Parameters:
    """The trainable tensors of a model and a guide by name, each once.

    Those of modules are found by walking the modules; those of ``pyro.param`` and ``pyro.module``
    are found in traces. A stale tensor that the global parameter store keeps under the name of a
    module's parameter, from an earlier pair of this process, is left out.

    Args:
        model: A Pyro model.
        guide: Its guide.

    Attributes:
        named: From name to unconstrained leaf tensor.
    """

    def __init__(self, model: Program, guide: Program) -> None:
        model, guide = bare(model), bare(guide)
        self.modules = {
            role: program
            for role, program in (("model", model), ("guide", guide))
            if isinstance(program, nn.Module)
        }
        # Networks that functions register by pyro.module: their buffers stand in no store.
        self._buffers = {
            f"{role}.{name}.{key}": buffer
            for role, program in (("model", model), ("guide", guide))
            if role not in self.modules
            for name, module in modules_of(program).items()
            for key, buffer in module.named_buffers()
        }
        self._registered = [
            module
            for program in (model, guide)
            if not isinstance(program, nn.Module)
            for module in modules_of(program).values()
        ]
        self.named: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        self._seen: set[int] = set()
        for role, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in self._seen:
                    self.named[f"{role}.{name}"] = parameter
                self._seen.add(id(parameter))  # the frozen ones too, whose sites a trace shows
        self._own_names = {
            name.removesuffix("_unconstrained")
            for module in self.modules.values()
            for name, _ in module.named_parameters()
        }

    def collect(self, trace: Trace) -> list[Tensor]:
        """Take up the parameter sites of a trace that are not known yet.

        Args:
            trace: A trace that recorded parameter sites.

        Returns:
            The new leaf tensors.

        Raises:
            ValueError: The parameter store holds an older network under the name of one that a
                function registers.
        """
        new = []
        for name, site in trace.nodes.items():
            if site["type"] != "param" or name in self._stored:
                continue
            leaf = site["value"].unconstrained() if _constrained(site["value"]) else site["value"]
            if id(leaf) in self._seen or name.replace("$$$", ".") in self._own_names:
                continue
            self._seen.add(id(leaf))
            self._stored[name] = self.named[name] = leaf
            new.append(leaf)
        if new:
            self._check_registered()
        return new

    def _check_registered(self) -> None:
        """Refuse to train or load the tensors of an older network in place of the pair's own."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, leaf in self._stored.items():
            owner, divider, key = name.partition("$$$")
            if divider:
                groups.setdefault(owner, {})[key] = leaf
        stored = {id(leaf) for leaf in self._stored.values()}
        for module in self._registered:
            own = dict(module.named_parameters())
            if not own or any(id(parameter) in stored for parameter in own.values()):
                continue
            for owner, leaves in groups.items():
                shapes = {key: leaf.shape for key, leaf in leaves.items()}
                if shapes == {key: parameter.shape for key, parameter in own.items()}:
                    raise ValueError(
                        f"the parameter store holds an older network under the name {owner!r}, and "
                        "the pair's own would stay as it is. Call pyro.clear_param_store() before "
                        "making a new pair."
                    )

    def not_finite(self) -> list[str]:
        """Names of those that hold NaN or infinite values."""
        return [name for name, leaf in self.named.items() if not leaf.isfinite().all()]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to restore the pair: modules, stored params, and other buffers."""
        return {
            "modules": {role: module.state_dict() for role, module in self.modules.items()},
            "params": {name: leaf.detach() for name, leaf in self._stored.items()},
            "buffers": dict(self._buffers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a saved state into the pair.

        Args:
            state: What ``state_dict`` returned for a pair of the same making.

        Raises:
            ValueError: The state belongs to another pair; the message names the first difference.
        """
        # Runs from before buffers were kept have none.
        state = {"buffers": {}, **state}
        _check_names("modules", set(self.modules), set(state["modules"]))
        _check_names("params", set(self._stored), set(state["params"]))
        for role, module in self.modules.items():
            own, saved = module.state_dict(), state["modules"][role]
            _check_names(role, set(own), set(saved))
            for name, tensor in own.items():
                _check_shape(f"{role}.{name}", tensor, saved[name])
        _check_names("buffers", set(self._buffers), set(state["buffers"]))
        for where, own in (("params", self._stored), ("buffers", self._buffers)):
            for name, tensor in own.items():
                _check_shape(name, tensor, state[where][name])
        for role, module in self.modules.items():
            module.load_state_dict(state["modules"][role])
        for name, leaf in self._stored.items():
            leaf.data.copy_(state["params"][name])
        for name, buffer in self._buffers.items():
            buffer.copy_(state["buffers"][name])


def _constrained(value: Any) -> bool:
    return hasattr(value, "unconstrained")


def _check_names(where: str, own: set[str], saved: set[str]) -> None:
    if own != saved:
        missing, unknown = sorted(own - saved)[:3], sorted(saved - own)[:3]
        raise ValueError(
            f"the checkpoint is of another pair: {where} has {missing or 'nothing'} here that the "
            f"checkpoint lacks, and the checkpoint has {unknown or 'nothing'} that is not here. "
            "Build the pair as it was built for that run."
        )


def _check_shape(name: str, own: Tensor, saved: Tensor) -> None:
    if own.shape != saved.shape:
        raise ValueError(
            f"the checkpoint is of another pair: {name} has shape {tuple(saved.shape)} on disk and "
            f"{tuple(own.shape)} here. Build the pair as it was built for that run."
        )
