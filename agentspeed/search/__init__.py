"""Searches over branches of a session: each try is a fork, the best one becomes the trunk, the rest frees its pages."""

from agentspeed.search.methods import beam, best_of_n, mcts, tree_of_thought
from agentspeed.search.plan import Attempt, Budget, Keep, Score
from agentspeed.search.tree import Cost, Found, Node

__all__ = [
    "Attempt",
    "Budget",
    "Cost",
    "Found",
    "Keep",
    "Node",
    "Score",
    "beam",
    "best_of_n",
    "mcts",
    "tree_of_thought",
]
