"""A graph for ComfyUI that samples the single file as it has to be sampled.

It is written as ComfyUI's own File > Save writes (workflow schema 0.4): every version opens that by dragging the file
into the window, with the nodes in their places. The API format is for programs and has no places.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

GRAPH_HASH_KEY = "sollune_sha256"
"""Key of `extra`, which ComfyUI leaves to others, with the hash of the graph without it."""


@dataclass(frozen=True)
class Node:
    """One box of the graph."""

    type: str
    position: tuple[int, int]
    """Left and top, in pixels of the canvas."""
    size: tuple[int, int]
    inputs: dict[str, tuple[int, str]]
    """Input -> the node it comes from (its place in the list, from 1) and the type of what comes."""
    outputs: tuple[str, ...]
    widgets: tuple[str | int | float, ...]


def workflow_json(file: str, shift: float, pixels: int, base_checkpoint: str | None = None) -> str:
    """The workflow as JSON; `file` is the single file's name, `pixels` the side of the pictures.

    With a `lender` the file holds a network alone, and text encoder and VAE come from the checkpoint of that name.
    """
    nodes = _graph_nodes(file, shift, pixels, base_checkpoint)
    links: list[list[Any]] = []
    drawn = []
    for number, node in enumerate(nodes, start=1):
        inputs = []
        for slot, (name, (source, kind)) in enumerate(node.inputs.items()):
            links.append([len(links) + 1, source, nodes[source - 1].outputs.index(kind), number, slot, kind])
            inputs.append({"name": name, "type": kind, "link": len(links)})
        drawn.append(_node_json(number, node, inputs))
    for box in drawn:
        for slot, output in enumerate(box["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [box["id"], slot]]
    whole = {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": drawn,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
    return _to_json({**whole, "extra": {GRAPH_HASH_KEY: _graph_hash(whole)}})


def is_unmodified_workflow(text: str) -> bool:
    """Whether a workflow is one of ours that nobody has changed, or one from before they were sealed."""
    try:
        whole = json.loads(text)
        extra = whole["extra"]
        return bool(text == _to_json(whole) and extra in ({}, {GRAPH_HASH_KEY: _graph_hash({**whole, "extra": {}})}))
    except (ValueError, KeyError, TypeError):
        return False


def _to_json(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=2) + "\n"


def _graph_hash(graph: dict[str, Any]) -> str:
    return hashlib.sha256(_to_json(graph).encode()).hexdigest()


def _graph_nodes(file: str, shift: float, pixels: int, base_checkpoint: str | None) -> list[Node]:
    """Loader -> ModelSamplingSD3 -> sampler -> picture; `simple` is the grid that ends where the path ends."""
    sampler: dict[str, tuple[int, str]] = {
        "model": (2, "MODEL"),
        "positive": (3, "CONDITIONING"),
        "negative": (4, "CONDITIONING"),
        "latent_image": (5, "LATENT"),
    }
    settings = (0, "fixed", 25, 5.0, "euler", "simple", 1.0)
    checkpoint = Node(
        "CheckpointLoaderSimple", (20, 100), (320, 100), {}, ("MODEL", "CLIP", "VAE"), (base_checkpoint or file,)
    )
    unet = Node("UNETLoader", (20, 0), (320, 80), {}, ("MODEL",), (file, "default"))
    model = (9 if base_checkpoint else 1, "MODEL")
    return [
        checkpoint,
        Node("ModelSamplingSD3", (400, 0), (320, 60), {"model": model}, ("MODEL",), (shift,)),
        Node("CLIPTextEncode", (400, 120), (400, 140), {"clip": (1, "CLIP")}, ("CONDITIONING",), ("a lighthouse",)),
        Node("CLIPTextEncode", (400, 320), (400, 140), {"clip": (1, "CLIP")}, ("CONDITIONING",), ("",)),
        Node("EmptyLatentImage", (400, 520), (320, 110), {}, ("LATENT",), (pixels, pixels, 1)),
        Node("KSampler", (860, 100), (320, 260), sampler, ("LATENT",), settings),
        Node("VAEDecode", (1240, 100), (210, 50), {"samples": (6, "LATENT"), "vae": (1, "VAE")}, ("IMAGE",), ()),
        Node("SaveImage", (1240, 220), (320, 320), {"images": (7, "IMAGE")}, (), ("sollune",)),
        *([unet] if base_checkpoint else []),
    ]


def _node_json(number: int, node: Node, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": number,
        "type": node.type,
        "pos": list(node.position),
        "size": list(node.size),
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": kind, "type": kind, "links": []} for kind in node.outputs],
        "properties": {"Node name for S&R": node.type},
        "widgets_values": list(node.widgets),
    }
