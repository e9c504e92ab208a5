"""One file a family; importing this package registers them all."""

from . import bruck, chain, direct, dissemination, double_tree, doubling, hierarchical, one_shot, ordered, ring, tree

__all__ = [
    "bruck", "chain", "direct", "dissemination", "double_tree", "doubling", "hierarchical", "one_shot", "ordered",
    "ring", "tree",
]  # fmt: skip
