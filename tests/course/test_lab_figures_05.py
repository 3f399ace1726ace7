"""Figures of notebook 05: bytes that are really those of the wire, storms that end or do not, and every drawing."""

import json
import threading

import numpy as np
import pytest
from google.protobuf import json_format

from flserving import create_serving_pipeline
from flserving.api.grpc.codec import InferRequest, message
from flserving.api.rest.codec import read_infer
from flserving.errors import InvalidInputError, OverloadedError
from flserving.lab import figures_05 as figures
from flserving.lab import storm, wire
from serving_models import PATIENCE_S

SHAPES = [(1, 1), (3, 64), (32, 784), (1000, 10)]


def rows_of(shape):
    return np.ascontiguousarray(wire.normal_rows()[: shape[0], : shape[1]])


def small_request():
    request = InferRequest(model_name="digits")
    request.inputs.add(name="features", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([1, 2.5], "<f4").tobytes())
    return request


# ------------------------------------------------------------------------------------------ bytes on the wire


@pytest.mark.parametrize("shape", SHAPES)
def test_the_expected_sizes_are_those_of_the_written_bodies(shape):
    assert wire.expected_sizes(*shape) == wire.body_sizes(rows_of(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_is_read_back_as_the_same_rows(shape):
    rows = rows_of(shape)
    for body in (wire.json_body(rows), wire.short_json_body(rows)):
        np.testing.assert_array_equal(read_infer(body).inputs["features"], rows)
    binary = wire.binary_body(rows)
    head = binary[: -rows.nbytes]
    np.testing.assert_array_equal(read_infer(binary, len(head)).inputs["features"], rows)
    assert json.loads(head)["inputs"][0]["parameters"]["binary_data_size"] == rows.nbytes
    request = InferRequest.FromString(wire.grpc_body(rows))
    assert request.raw_input_contents[0] == rows.tobytes() and list(request.inputs[0].shape) == list(shape)


def test_the_time_on_the_line_is_bits_over_bandwidth():
    table = wire.transfer(1000, 784, mbit_per_s=10)
    assert table["ms"]["gRPC"] == pytest.approx(table["bytes"]["gRPC"] * 8 / 10e6 * 1000)
    assert list(table.index) == list(wire.FORMS)


# ------------------------------------------------------------------------------------------ messages byte by byte


def test_the_fields_of_a_message_cover_its_bytes_in_order():
    raw, fields = small_request().SerializeToString(), wire.wire_fields(small_request())
    top = [field for field in fields if field.depth == 0]
    assert [top[0].start, *(field.end for field in top)] == [*(field.start for field in top), len(raw)]
    assert [(field.path, field.number) for field in fields] == [
        ("model_name", 1), ("inputs", 5), ("inputs.name", 1), ("inputs.datatype", 2), ("inputs.shape", 3),
        ("raw_input_contents", 7),
    ]  # fmt: skip
    text = {field.path: raw[field.content : field.end] for field in fields}
    assert text["model_name"] == b"digits" and text["inputs.name"] == b"features" and text["inputs.shape"] == b"\1\2"


def test_varints_and_fixed_numbers_have_their_own_wire_types():
    reply = message("inference.ModelInferResponse")()
    json_format.ParseDict({"parameters": {"latency_us": {"int64_param": "300"}, "x": {"double_param": 1.5}}}, reply)
    kinds = {field.path: (field.wire_type, field.end - field.content) for field in wire.wire_fields(reply)}
    assert kinds["parameters.value.int64_param"] == ("VARINT", 2)  # 300 takes two groups of seven bits
    assert kinds["parameters.value.double_param"] == ("I64", 8)


def test_bytes_of_another_message_are_refused():
    with pytest.raises(InvalidInputError, match=r"byte 0 is the key 10: .* has no such field"):
        list(wire._fields(b"\x0a\x01a", 0, message("inference.ServerLiveRequest").DESCRIPTOR, "", 0))


def test_the_table_and_the_figure_of_a_message():
    table = figures.message_table(small_request())
    assert dict(table.loc["inputs"]) == {
        "key": "2a", "in bits": "00101 010", "number": 5, "wire type": "2 LEN", "length (bytes)": 20,
    }  # fmt: skip
    (ax,) = figures.message_figure(small_request()).axes
    raw, written = small_request().SerializeToString(), [text.get_text() for text in ax.texts]
    assert [text for text in written if len(text) == 2] == [f"{byte:02x}" for byte in raw]
    assert "7 raw_input_contents" in written and len(ax.patches) == len(raw)


# --------------------------------------------------------------------------------------------------- storms


@pytest.fixture(scope="module")
def storms():
    return {name: storm.simulate_storm(**how) for name, how in storm.SCENARIOS.items()}


def test_only_retries_without_bound_keep_a_server_down_that_has_room_for_all(storms):
    alone, retries, budget, dropped = storms.values()
    assert (retries.answered_share()[9:] == 0).all() and retries.tries_per_s()[20:].min() > 3 * 300
    for healed in (alone, budget, dropped):
        assert (healed.answered_share()[:4] == 1).all() and (healed.answered_share()[14:] == 1).all()
        assert healed.tries_per_s()[20:].max() < 1.3 * 300
    assert dropped.answered.mean() > budget.answered.mean()  # who drops late work answers even those who asked again


def test_without_an_outage_nobody_asks_again():
    calm = storm.simulate_storm(stands_still_s=(5, 5), seconds=10)
    assert calm.answered.all() and len(calm.try_s) == len(calm.call_s)
    assert storm.simulate_storm(stands_still_s=(5, 5), seconds=10).try_s.tolist() == calm.try_s.tolist()


def test_the_storm_figure_shows_every_scenario(storms):
    above, below = figures.storm_figure(storms, (5, 8)).axes
    assert len(above.lines) == len(below.lines) == 4
    assert above.get_ylabel() == "tries (per s)" and below.get_xlabel() == "time (s)"


# --------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("shape", [(1, 1, 1), (1000, 784, 10_000)])
def test_the_explorer_draws_its_ends(shape):
    drawn = figures.transfer_figure(wire.transfer(*shape))
    left, right = drawn.axes
    for ax in (left, right):
        low, high = ax.get_xlim()
        assert all(low < bar.get_width() < high for bar in ax.patches)


def test_sizes_are_drawn_one_panel_beside_the_other():
    sizes = {"a": {1: {"JSON": 10, "gRPC": 5}, 32: {"JSON": 300, "gRPC": 90}}, "b": {1: {"JSON": 1, "gRPC": 2}}}
    left, right = figures.sizes_figure(sizes).axes
    assert sorted(bar.get_height() for bar in left.patches) == [5, 10, 90, 300] and len(right.patches) == 2


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (40, "40 B"), (3136165, "3.14 MB"), (2e9, "2 GB")])
def test_bytes_are_told_with_three_digits(nbytes, text):
    assert figures.nbytes_text(nbytes) == text


@pytest.mark.parametrize(("ms", "text"), [(2e-4, "200 ns"), (0.03, "30 µs"), (80.4, "80.4 ms"), (5e6, "5,000 s")])
def test_times_are_told_in_their_unit(ms, text):
    assert figures.ms_text(ms) == text


def test_a_digit_is_shown_with_what_was_said_to_it():
    left, right = figures.digit_figure(range(64), np.full(10, 0.1), "3").axes
    assert left.images[0].get_array().shape == (8, 8) and len(right.patches) == 10
    assert right.get_title(loc="left") == "version 3 says 0"


def test_an_outcome_is_told_by_its_class_and_a_bug_shows_as_one():
    def busy():
        raise OverloadedError("full")

    assert [figures.outcome(busy), figures.outcome(lambda: 1)] == ["OverloadedError", "answered"]
    with pytest.raises(ZeroDivisionError):
        figures.outcome(lambda: 1 / 0)


def test_callers_at_once_are_timed_from_the_call_to_its_end():
    together = threading.Barrier(5, timeout=PATIENCE_S)

    def call():
        if together.wait() == 0:
            raise OverloadedError("full")

    table = figures.at_once(call, callers=5)
    assert sorted(table["end"]) == ["OverloadedError", *["answered"] * 4] and (table["ms"] > 0).all()


def test_the_slow_model_counts_what_it_worked_on_in_the_servers_copy_too():
    slow = figures.Slow(seconds_per_row=0)
    with create_serving_pipeline(slow) as server:
        slow.worked = 0
        server.predict(np.ones((3, 4), np.float32))
    assert slow.worked == 3


def test_a_body_is_shortened_for_reading():
    text = figures.shortened(json.dumps({"outputs": [{"name": "p", "data": list(np.linspace(0, 1, 99))}]}).encode())
    assert (
        text.splitlines()[0] == "{"
        and '"name": "p"' in text
        and "...]" in text
        and max(map(len, text.splitlines())) < 90
    )
