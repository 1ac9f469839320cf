"""The Weaver REST interface, for programs written for `nex-weaver`; mounted under /api/v1.

docs/weaver-rest.md has the table of its routes. Each noun has a file of its own beside this one;
here are the operations' long poll, and the routes of what has no meaning on this server.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from weaver.errors import UnsupportedError
from weaver.server.compat import (
    weaver_rest_artifacts,
    weaver_rest_models,
    weaver_rest_sampling,
    weaver_rest_training,
)
from weaver.server.compat.weaver_rest_errors import PREFIX
from weaver.server.compat.weaver_rest_operations import POLL_S, Desked, answered

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
ABSENT = {
    "organizations": "Projects come with API keys: `weaver keys create --project NAME`.",
    "scope": "Projects come with API keys: leave organization and project out.",
    "quota": "Nothing is billed here.",
    "scheduling": "Operations run in fair turns: leave scheduling_policy out.",
    "managed-datasets": "Send the tokens of each datum.",
    "deployments": "Sample from a checkpoint, or export it.",
}
"""First part of a path, and what to do instead."""

router = APIRouter(prefix=PREFIX, include_in_schema=False)


@router.get("/operations/{operation_id}")
async def get_operation(operation_id: str, desk: Desked) -> Response:
    return await answered(desk, desk.find(operation_id), hold_s=POLL_S)


@router.post("/checkpoints/{checkpoint_id}/deployments")
@router.post("/models/{model_id}/managed-dataset-sample-lengths")
async def absent_part() -> None:
    raise UnsupportedError(
        "this server has no deployments and no managed datasets.",
        hint="See docs/weaver-rest.md for what it has.",
    )


def _refuse(noun: str, hint: str) -> None:
    async def absent() -> None:
        raise UnsupportedError(f"this server has no {noun}.", hint=hint)

    for path in (f"/{noun}", f"/{noun}/{{rest:path}}"):
        router.add_api_route(path, absent, methods=METHODS)


for _noun, _hint in ABSENT.items():
    _refuse(_noun, _hint)
for _part in (
    weaver_rest_models,
    weaver_rest_training,
    weaver_rest_sampling,
    weaver_rest_artifacts,
):
    router.include_router(_part.router)
