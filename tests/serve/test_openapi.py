"""schemathesis walks the OpenAPI document: whatever it thinks of, good or bad, no reply is a 5xx or one that the document does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tnl.serve.gate import Limits
from tnl.serve.run import Serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    ignored_auth,
]


@pytest.fixture(scope="module")
def walked(start: Callable[..., Any], base: Path, adapters: Path) -> Any:
    limits = Limits(max_tokens=4, prompt=500, answers=4)
    return start(base, Serving(adapters=adapters, runs=adapters, limits=limits), max_new_tokens=4)


def test_the_document(walked: Any) -> None:
    with walked.client() as client:
        document = client.get("/openapi.json").json()
    paths = {path: sorted(operations) for path, operations in document["paths"].items()}
    assert paths == {
        "/v1/chat/completions": ["post"],
        "/v1/completions": ["post"],
        "/": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{name}": ["get"],
        "/v1/models/{name}/load": ["post"],
        "/v1/models/{name}/unload": ["post"],
        "/health": ["get"],
        "/metrics": ["get"],
        "/v1/runs": ["get"],
        "/v1/runs/{name}": ["get"],
    }
    assert "422" not in str(document["paths"])
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["additionalProperties"] is False and schemas["ChatRequest"]["properties"]["messages"]["maxItems"] == 1000


def walk(live: Any, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        wrong = {"requestBody", "parameters"} & operation.definition.raw.keys()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if wrong else (GenerationMode.POSITIVE,):

            @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                # a name that nobody serves would be 404 whatever else is asked; one that is wrong in itself stays
                if isinstance(case.body, dict) and isinstance(name := case.body.get("model"), str) and len(name) <= 200:
                    case.body["model"] = "tiny-base"
                case.call_and_validate(checks=CHECKS)

            one()


def test_schemathesis(walked: Any) -> None:
    walk(walked, 4)
    assert walked.settled()


@pytest.mark.slow
def test_schemathesis_for_long(walked: Any) -> None:
    walk(walked, 200)
    assert walked.settled()
