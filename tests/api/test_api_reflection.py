"""Server reflection: a caller that knows no .proto file learns every method and message, with a
credential, in time."""

import threading

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from flserving.api.dataplane import V2
from flserving.api.grpc import codec, reflection
from flserving.api.grpc.service import Service
from flserving.api.options import ApiOptions
from grpc_door import metadata, open_door
from serving_models import PATIENCE_S, Constant, serving

NEW, OLD = reflection.SERVICES
Question = codec.message("grpc.reflection.v1.ServerReflectionRequest")
Answer = codec.message("grpc.reflection.v1.ServerReflectionResponse")
LISTED = [codec.SERVICE, codec.HEALTH, codec.EXPERIMENTS, NEW]


@pytest.fixture(scope="module")
def server():
    with serving(Constant(3)) as server:
        yield server


@pytest.fixture(scope="module")
def target(server):
    with open_door(server) as (_, target, _, _):
        yield target


def ask(target, *bodies, token="read", service=NEW):
    """The answers of one call, whose caller ends it after its questions."""
    with grpc.insecure_channel(target) as channel:
        call = channel.stream_stream(f"/{service}/ServerReflectionInfo")
        answers = call(iter(bodies), metadata=metadata(token), timeout=PATIENCE_S)
        return [Answer.FromString(answer) for answer in answers]


def question(**field):
    return Question(host="here", **field).SerializeToString()


@pytest.mark.parametrize("service", [NEW, OLD])
def test_from_the_answers_alone_every_method_and_message_is_known(server, target, service):
    (listed,) = ask(target, question(list_services="*"), service=service)
    names = [one.name for one in listed.list_services_response.service]
    assert names == LISTED
    found = ask(target, *(question(file_containing_symbol=name) for name in names), service=service)
    pool = descriptor_pool.DescriptorPool()
    for answer in found:
        assert (
            answer.valid_host == "here" and answer.original_request.file_containing_symbol in names
        )
        for file in answer.file_descriptor_response.file_descriptor_proto:
            pool.AddSerializedFile(file)
            assert not descriptor_pb2.FileDescriptorProto.FromString(file).dependency, (
                "each file is whole"
            )
    handlers = Service(V2(server), ApiOptions()).methods()
    assert handlers.keys() == {*names, OLD}
    for name in names:
        methods = pool.FindServiceByName(name).methods_by_name
        assert {*methods} == {*handlers[name]}
        for method, what in methods.items():
            assert what.server_streaming == handlers[name][method].response_streaming, method
            for kind in (what.input_type, what.output_type):
                same = codec.message(kind.full_name).DESCRIPTOR
                assert [(field.name, field.number) for field in kind.fields] == [
                    (field.name, field.number) for field in same.fields
                ]


def test_a_file_is_found_by_its_name_and_by_every_name_in_it(target):
    asked = [
        {"file_by_filename": "inference.proto"},
        *(
            {"file_containing_symbol": f"inference.{name}"}
            for name in ("ModelConfig", "DataType", "ModelInferRequest")
        ),
        {"file_containing_symbol": "inference.ModelInferRequest.InferInputTensor"},
        {"file_containing_symbol": "inference.GRPCInferenceService.ModelInfer"},
    ]
    answers = ask(target, *(question(**field) for field in asked))
    files = {tuple(answer.file_descriptor_response.file_descriptor_proto) for answer in answers}
    assert len(answers) == len(asked) and files == {
        (codec.POOL.FindFileByName("inference.proto").serialized_pb,)
    }


@pytest.mark.parametrize(
    "field",
    [
        {"file_by_filename": "../inference.proto"},
        {"file_containing_symbol": "inference.Nothing"},
        {"file_containing_symbol": "inference.GRPCInferenceService.Nothing"},
        {"file_containing_symbol": "\0"},
        {
            "file_containing_extension": {
                "containing_type": "inference.ModelConfig",
                "extension_number": 100,
            }
        },
        {"all_extension_numbers_of_type": "inference.ModelConfig"},
        {},
    ],
    ids=str,
)
def test_what_is_not_there_is_an_answer_and_the_next_question_is_answered(target, field):
    refused, listed = ask(target, question(**field), question(list_services=""))
    assert refused.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert len(listed.list_services_response.service) == len(LISTED)


@pytest.mark.parametrize(
    ("token", "code"), [(None, "UNAUTHENTICATED"), ("unknown", "UNAUTHENTICATED")]
)
@pytest.mark.parametrize("service", [NEW, OLD])
def test_without_a_credential_nothing_is_said(target, service, token, code):
    with pytest.raises(grpc.RpcError) as error:
        ask(target, question(list_services="*"), token=token, service=service)
    assert error.value.code().name == code


def test_bytes_that_are_no_question_end_the_call(target):
    with pytest.raises(grpc.RpcError) as error:
        ask(target, b"\xff\xff\xff")
    assert (
        error.value.code().name == "INVALID_ARGUMENT"
        and "3 bytes are not a grpc.reflection" in error.value.details()
    )


def test_a_caller_that_asks_nothing_more_is_sent_away_in_time(server):
    with (
        open_door(server, slow_client_s=1) as (_, target, _, _),
        grpc.insecure_channel(target) as channel,
    ):
        asked = iter([question(list_services="*")])

        def and_then_silence():
            yield next(asked)
            ended.wait(PATIENCE_S)

        ended = threading.Event()
        call = channel.stream_stream(f"/{NEW}/ServerReflectionInfo")
        answers = call(and_then_silence(), metadata=metadata("read"), timeout=PATIENCE_S)
        assert Answer.FromString(next(answers)).list_services_response.service
        with pytest.raises(grpc.RpcError) as error:
            next(answers)
        ended.set()
        assert (
            error.value.code().name == "DEADLINE_EXCEEDED"
            and "did not come in time" in error.value.details()
        )
