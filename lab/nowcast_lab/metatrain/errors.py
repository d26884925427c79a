"""What can be wrong with a recipe, a data source or a folder of trajectories."""

from __future__ import annotations

from nowcast_proto.errors import NowcastError


class InvalidRecipe(NowcastError):
    """A recipe, task or data source that does not exist, contradicts itself, or is held out for evaluation."""

    code = "invalid_recipe"
    http_status = 422


class InvalidTrajectories(NowcastError):
    """A trajectory folder that is damaged, empty, or made by something else."""

    code = "invalid_trajectories"
    http_status = 422
