"""A ComfyUI workflow that samples an exported single file with the right shift, sampler and scheduler.

It has the format of ComfyUI's File > Save (workflow schema 0.4), which every version opens by drag and drop, not the
API format, which holds no positions.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from configs.values import PictureSize
from stages.flow.windows import window_ends

WORKFLOW_FILE = "workflow-comfyui.json"
GRAPH_HASH_KEY = "sollune_sha256"
"""Key of `extra`, which ComfyUI leaves to others, with the hash of the graph without it."""
Inputs = dict[str, tuple[int, str]]
"""Input -> the node it comes from (its place in the list, from 1) and its type."""


@dataclass(frozen=True)
class Node:
    """One node of the graph."""

    type: str
    position: tuple[int, int]
    """Left and top, in pixels of the canvas."""
    size: tuple[int, int]
    inputs: Inputs
    outputs: tuple[str, ...]
    widgets: tuple[str | int | float | bool, ...]

    def to_json(self, number: int, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The node in the workflow's format, its outputs not linked yet."""
        return {
            "id": number,
            "type": self.type,
            "pos": list(self.position),
            "size": list(self.size),
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": [{"name": kind, "type": kind, "links": []} for kind in self.outputs],
            "properties": {"Node name for S&R": self.type},
            "widgets_values": list(self.widgets),
        }


def workflow_json(
    file: str,
    shift: float,
    size: PictureSize,
    base_checkpoint: str | None = None,
    *,
    clip_skip: int = 0,
    windows: int | None = None,
) -> str:
    """The workflow as JSON; `file` is the single file's name, `size` that of the pictures.

    With a `base_checkpoint` the file holds a UNet alone; text encoder and VAE come from the checkpoint of that name.
    `clip_skip` is how many last layers of the text encoder are left out. `windows` are the steps of a student of few,
    whose guidance is in its weights.
    """
    nodes = _graph_nodes(file, shift, size, base_checkpoint, clip_skip)
    if windows is not None:
        nodes = _step_along_windows(nodes, windows)
    links: list[list[Any]] = []
    boxes = []
    for number, node in enumerate(nodes, start=1):
        inputs = []
        for slot, (name, (source, kind)) in enumerate(node.inputs.items()):
            links.append([len(links) + 1, source, nodes[source - 1].outputs.index(kind), number, slot, kind])
            inputs.append({"name": name, "type": kind, "link": len(links)})
        boxes.append(node.to_json(number, inputs))
    for box in boxes:
        for slot, output in enumerate(box["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [box["id"], slot]]
    graph = {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": boxes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
    return _to_json({**graph, "extra": {GRAPH_HASH_KEY: _graph_hash(graph)}})


def is_unmodified_workflow(text: str) -> bool:
    """Whether a workflow is an unmodified one of ours; those of early versions carry no hash."""
    try:
        graph = json.loads(text)
        extra = graph["extra"]
        return bool(text == _to_json(graph) and extra in ({}, {GRAPH_HASH_KEY: _graph_hash({**graph, "extra": {}})}))
    except (ValueError, KeyError, TypeError):
        return False


def _to_json(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=2) + "\n"


def _graph_hash(graph: dict[str, Any]) -> str:
    return hashlib.sha256(_to_json(graph).encode()).hexdigest()


def _graph_nodes(file: str, shift: float, size: PictureSize, base_checkpoint: str | None, clip_skip: int) -> list[Node]:
    """Loader -> ModelSamplingSD3 -> sampler -> picture; the scheduler `simple` ends at s = 0.

    ComfyUI counts the text encoder's last layer as -1.
    """
    model: Inputs = {"model": (9 if base_checkpoint else 1, "MODEL")}
    sampler: Inputs = {
        "model": (2, "MODEL"),
        "positive": (3, "CONDITIONING"),
        "negative": (4, "CONDITIONING"),
        "latent_image": (5, "LATENT"),
    }
    settings = (0, "fixed", 25, 5.0, "euler", "simple", 1.0)
    loader = ("MODEL", "CLIP", "VAE")
    unet = Node("UNETLoader", (20, 0), (320, 80), {}, ("MODEL",), (file, "default"))
    whole: Inputs = {"clip": (1, "CLIP")}
    clip: Inputs = {"clip": (10 if base_checkpoint else 9, "CLIP")} if clip_skip else whole
    last_layer = Node("CLIPSetLastLayer", (20, 260), (320, 60), whole, ("CLIP",), (-(clip_skip + 1),))
    return [
        Node("CheckpointLoaderSimple", (20, 100), (320, 100), {}, loader, (base_checkpoint or file,)),
        Node("ModelSamplingSD3", (400, 0), (320, 60), model, ("MODEL",), (shift,)),
        Node("CLIPTextEncode", (400, 120), (400, 140), clip, ("CONDITIONING",), ("a lighthouse",)),
        Node("CLIPTextEncode", (400, 320), (400, 140), clip, ("CONDITIONING",), ("",)),
        Node("EmptyLatentImage", (400, 520), (320, 110), {}, ("LATENT",), (size.width, size.height, 1)),
        Node("KSampler", (860, 100), (320, 260), sampler, ("LATENT",), settings),
        Node("VAEDecode", (1240, 100), (210, 50), {"samples": (6, "LATENT"), "vae": (1, "VAE")}, ("IMAGE",), ()),
        Node("SaveImage", (1240, 220), (320, 320), {"images": (7, "IMAGE")}, (), ("sollune",)),
        *([unet] if base_checkpoint else []),
        *([last_layer] if clip_skip else []),
    ]


def _step_along_windows(nodes: list[Node], windows: int) -> list[Node]:
    """The graph with euler on the ends of the windows, which no scheduler of ComfyUI has, at cfg 1.

    With cfg 1 ComfyUI does not evaluate the negative sentence. It begins at the first end times the noise, a part in a
    thousand less than stock diffusers.
    """
    sigmas = ", ".join(f"{end:.9g}" for end in window_ends(windows).tolist())
    (place,) = (place for place, node in enumerate(nodes) if node.type == "KSampler")
    sampler = nodes[place]
    inputs = {**sampler.inputs, "sampler": (len(nodes) + 1, "SAMPLER"), "sigmas": (len(nodes) + 2, "SIGMAS")}
    custom = Node(
        "SamplerCustom", sampler.position, sampler.size, inputs, ("LATENT", "LATENT"), (True, 0, "fixed", 1.0)
    )
    return [
        *nodes[:place],
        custom,
        *nodes[place + 1 :],
        Node("KSamplerSelect", (860, 420), (320, 60), {}, ("SAMPLER",), ("euler",)),
        Node("ManualSigmas", (860, 540), (320, 60), {}, ("SIGMAS",), (sigmas,)),
    ]
