"""Checkpoint families, a file each: how their config and their tensor names become ours."""

from mythos_export.families import deepseek, llama, mixtral, open_mythos
from mythos_export.families.family import Family

FAMILIES: tuple[Family, ...] = (open_mythos.FAMILY, llama.FAMILY, mixtral.FAMILY, deepseek.FAMILY)

__all__ = ["FAMILIES", "Family"]
