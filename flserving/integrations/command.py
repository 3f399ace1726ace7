"""``flserving import``: a file of another tool becomes the next version of a model. Loads the rest
when it runs."""

import argparse
import os
from typing import Any

import msgspec

from flserving.errors import ConfigError
from flserving.models.own_code import import_modules, import_option


def options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving import``."""
    home = os.path.expanduser
    parser.add_argument(
        "file", metavar="FILE", type=home, help=".npz, .pt with a state dict, .safetensors or .onnx"
    )
    parser.add_argument(
        "--registry", required=True, metavar="DIR", type=home, help="the folder to publish it to"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="the name that it becomes the next version of",
    )
    parser.add_argument(
        "--architecture", metavar="NAME", help="a registered one; by default the only one that fits"
    )
    parser.add_argument(
        "--parameters", metavar="JSON", help='of the architecture, e.g. {"sizes": [64, 64, 10]}'
    )
    import_option(parser)
    parser.add_argument(
        "--preprocessing",
        metavar="JSON",
        help='what clients standardised with: {"mean": [...], "std": [...]}',
    )
    parser.add_argument(
        "--output-type",
        choices=["classification", "regression"],
        default="classification",
        help="what its outputs are",
    )
    parser.add_argument(
        "--round", type=int, metavar="N", help="federated round; by default as the file tells"
    )
    parser.add_argument(
        "--tool", metavar="TEXT", help="who trained it; by default as the file tells"
    )
    parser.add_argument("--alias", metavar="NAME", help="point this alias at the new version")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read, check, publish; where the file cannot be served, not even the registry's folder is
    made."""
    from flserving.integrations.importing import read_model
    from flserving.registry import Registry

    import_modules(arguments.imports)
    lineage: dict[str, Any] = {"round": arguments.round}
    if arguments.tool:
        lineage["extra"] = {"tool": arguments.tool}
    model = read_model(
        arguments.file,
        arguments.model,
        answers=arguments.alias is not None,
        architecture=arguments.architecture,
        parameters=_json("parameters", arguments.parameters),
        lineage=lineage,
        preprocessing=_json("preprocessing", arguments.preprocessing),
        output_type=arguments.output_type,
    )
    with Registry(arguments.registry) as registry:
        manifest = model.publish(registry, alias=arguments.alias)
    if arguments.json:
        print(msgspec.json.encode({"manifest": manifest, "notes": model.notes}).decode())
    else:
        print(
            "\n".join(
                [
                    f"version {manifest.version} of {manifest.name!r}: {manifest.architecture}",
                    *model.notes,
                ]
            )
        )
    return 0


def _json(name: str, text: str | None) -> dict[str, Any] | None:
    try:
        return None if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--{name} {(text or '')[:80]!r} is no JSON object: {error}") from error
