from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch, Rectangle
from nowcast_proto.errors import InvalidRequest, UnreadableFile
from nowcast_service.cli import main
from nowcast_service.graph.blocks import EdgeType
from nowcast_service.graph.draw import COLOURS, adjacency, draw, layered
from nowcast_service.graph.wiring.build import build_graph

from .specs import gpt2, llama, spec_of

SPECS = {
    "shared heads": llama(wiring="faithful"),
    "large": llama(16, 2048, 32, 8, 8192, 128_256),
}


@pytest.mark.parametrize("spec", [SPECS["shared heads"], SPECS["large"]], ids=["neurons", "blocks"])
def test_a_drawing_is_a_picture_that_is_not_blank(spec, tmp_path):
    path = tmp_path / "graph.png"
    draw(build_graph(spec), path)
    pixels = imread(path)
    assert pixels.shape[0] > 500
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 8


def test_the_matrix_shows_every_edge_in_the_colour_of_its_type():
    graph = build_graph(gpt2())
    axes = Figure().subplots()
    adjacency(graph, axes)
    cells = {}
    for patch in axes.patches:
        assert isinstance(patch, Rectangle)
        left, top, width, height = patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()
        for source in range(round(top), round(top + height)):
            for target in range(round(left), round(left + width)):
                cells[source, target] = patch.get_facecolor()
    edges = {}
    for block in sorted(graph.blocks, key=lambda block: block.edge_type is not EdgeType.SELF_LOOP):
        colour = Rectangle((0, 0), 1, 1, facecolor=COLOURS[block.edge_type]).get_facecolor()
        edges |= dict.fromkeys(map(tuple, block.edge_index().t().tolist()), colour)
    assert cells == edges


def test_large_graphs_are_drawn_as_boxes_and_say_what_they_leave_out():
    axes = Figure().subplots()
    layered(build_graph(SPECS["large"]), axes)
    assert 10 < sum(isinstance(patch, FancyBboxPatch) for patch in axes.patches) < 40
    assert "left out" in axes.get_title()
    assert "128,256" in [text.get_text() for text in axes.texts]


def test_unknown_formats_and_folders_that_are_not_there_are_refused(tmp_path):
    graph = build_graph(gpt2())
    with pytest.raises(InvalidRequest, match=r"\.txt"):
        draw(graph, tmp_path / "graph.txt")
    with pytest.raises(UnreadableFile, match="cannot be written"):
        draw(graph, tmp_path / "nowhere" / "graph.png")


@pytest.fixture
def run(capsys):
    def command(*args):
        with pytest.raises(SystemExit) as ended:
            main(["graph", *map(str, args)])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return command


def test_the_command_draws_and_prints_coverage(tmp_path, run):
    shapes = {**gpt2().shapes(), "logit_scale": ()}
    (tmp_path / "net.json").write_text(spec_of("gpt2", shapes, num_heads=2).canonical())
    code, out, err = run(tmp_path / "net.json", "-o", tmp_path / "net.png")
    assert (code, out) == (0, "")
    assert "1 of 29 parameters are not in the graph" in err
    assert imread(tmp_path / "net.png").shape[2] == 4
    code, out, err = run(tmp_path / "net.json", "--coverage", "--uncovered", "edgewise")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("logit_scale"))
    assert "edge-wise" in line
    assert "a scalar belongs to no neuron" in line
    assert "28 of 29 parameters in the graph, 1,116 of 1,117 elements" in out
    code, out, _ = run(tmp_path / "net.json", "--json")
    assert json.loads(out)["nodes"] == 142


def test_a_bad_spec_is_one_message_and_status_2(tmp_path, run):
    (tmp_path / "net.json").write_text('{"family": "mamba", "parameters": [{"name": "a", "shape": [1]}]}')
    code, out, err = run(tmp_path / "net.json", "-o", tmp_path / "net.png")
    assert code == 2
    assert out == ""
    assert "mamba" in err
    assert "Traceback" not in err
    assert not (tmp_path / "net.png").exists()
