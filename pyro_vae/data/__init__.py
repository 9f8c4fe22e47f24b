"""Data that know what their values are."""

from pyro_vae.data.kinds import PARTS, Kind
from pyro_vae.data.sets import load_data, restore
from pyro_vae.data.split import Labels, Split

__all__ = ["PARTS", "Kind", "Labels", "Split", "load_data", "restore"]
