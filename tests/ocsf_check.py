"""Whether an event is OCSF 1.8.0: the schema's own JSON Schema (package `ocsf-json-schema`), and the rules it can't state.

`problems(event)` is for any test that makes events; an empty list means: nothing found.
"""

from functools import lru_cache
from typing import Any

import jsonschema
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema


@lru_cache(maxsize=1)
def _schema() -> OcsfJsonSchemaEmbedded:
    return OcsfJsonSchemaEmbedded(get_ocsf_schema("1.8.0"))


@lru_cache(maxsize=64)
def _validator(class_uid: int, profiles: tuple[str, ...]) -> Any:
    embedded = _schema()
    schema = embedded.get_class_schema(embedded.lookup_class_name_from_uid(class_uid), list(profiles))
    kind = jsonschema.validators.validator_for(schema)
    return kind(schema)


def _empty(value: Any, path: str) -> list[str]:
    if value is None or value == "":
        return [f"{path}: unknown is left out, neither null nor empty"]
    if isinstance(value, dict):
        return [each for key, inner in value.items() for each in _empty(inner, f"{path}.{key}" if path else key)]
    if isinstance(value, list):
        return [each for number, inner in enumerate(value) for each in _empty(inner, f"{path}[{number}]")]
    return []


def problems(event: dict[str, Any]) -> list[str]:
    """What is wrong with an event (a decoded JSON object), worst first; [] when nothing is."""
    profiles = tuple(event.get("metadata", {}).get("profiles", ()))
    try:
        validator = _validator(event["class_uid"], profiles)
    except (KeyError, ValueError) as error:
        return [f"class_uid: {error}"]
    found = [f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in validator.iter_errors(event)]
    if event["type_uid"] != event["class_uid"] * 100 + event["activity_id"]:
        found.append(f"type_uid: {event['type_uid']} is not class_uid * 100 + activity_id")
    if event["category_uid"] != event["class_uid"] // 1000:
        found.append("category_uid: is not the class's thousands")
    if event["metadata"].get("version") != "1.8.0":
        found.append("metadata.version: is not 1.8.0")
    if not event["metadata"].get("uid"):
        found.append("metadata.uid: missing")
    return found + _empty({key: value for key, value in event.items() if key != "unmapped"}, "")
