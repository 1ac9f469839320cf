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
from weaver.server.compat.weaver_rest_ids import PREFIX
from weaver.server.compat.weaver_rest_operations import POLL_S, Desked, JsonResponse, answered

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
DEPLOYMENTS = "Sample from a checkpoint, or export it."
DATA_SETS = "Send the tokens of each datum."
ABSENT = {
    "organizations": "Projects come with API keys: `weaver keys create --project NAME`.",
    "scope": "Projects come with API keys: leave organization and project out.",
    "quota": "Nothing is billed here.",
    "scheduling": "Operations run in fair turns: leave scheduling_policy out.",
    "managed-datasets": DATA_SETS,
    "models/{model_id}/managed-dataset-sample-lengths": DATA_SETS,
    "deployments": DEPLOYMENTS,
    "checkpoints/{checkpoint_id}/deployments": DEPLOYMENTS,
}
"""Beginnings of paths, and what to do instead."""

router = APIRouter(prefix=PREFIX, include_in_schema=False, default_response_class=JsonResponse)


@router.get("/operations/{operation_id}")
async def get_operation(operation_id: str, desk: Desked) -> Response:
    return await answered(desk, desk.find(operation_id), hold_s=POLL_S)


def _refuse(path: str, hint: str) -> None:
    async def absent() -> None:
        raise UnsupportedError(f"this server has no {path.rpartition('/')[2]}.", hint=hint)

    for ending in ("", "/{rest:path}"):
        router.add_api_route(f"/{path}{ending}", absent, methods=METHODS)


for _path, _hint in ABSENT.items():
    _refuse(_path, _hint)
for _part in (
    weaver_rest_models,
    weaver_rest_training,
    weaver_rest_sampling,
    weaver_rest_artifacts,
):
    router.include_router(_part.router)
