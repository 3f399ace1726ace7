"""One rule for every option: the command line, else the variable, else the default; a wrong
variable is named."""

import pytest

from flserving.api import cli
from flserving.api.commands import registry
from flserving.api.commands.parser import Parser, described, subcommands, variable


def options_of(command):
    """The options of a command; those of ``registry promote`` as "registry"."""
    parser = Parser(prog="flserving")
    commands = {"registry": registry.COMMANDS["promote"]} if command == "registry" else cli.COMMANDS
    commands[command].options(parser)
    return [action for action in parser._actions if action.option_strings]


@pytest.fixture
def parser():
    def fill(parser):
        parser.add_argument("--max-rows", type=int, default=32, help="most rows")
        parser.add_argument("--size", choices=["small", "large"], default="small", help="a size")
        parser.add_argument("--quiet", action="store_true", help="say nothing")
        parser.add_argument("--origin", action="append", default=[], help="a page")
        parser.add_argument("--folder", required=True, help="a folder")

    parser = Parser(prog="program")
    subcommands(parser, "command", {"run": cli.Command("it runs", int, fill)})
    return parser


@pytest.fixture
def parsed(parser, monkeypatch):
    def parse(*arguments, **environment):
        for name, value in {"FOLDER": "here", **environment}.items():
            monkeypatch.setenv(f"FLSERVING_{name}", value)
        found = vars(parser.parse_args(["run", *arguments]))
        return {name: found[name] for name in ("max_rows", "size", "quiet", "origin", "folder")}

    return parse


DEFAULTS = {"max_rows": 32, "size": "small", "quiet": False, "origin": [], "folder": "here"}
ENVIRONMENT = {
    "MAX_ROWS": "64",
    "SIZE": "large",
    "QUIET": "1",
    "ORIGIN": "http://a, http://b",
    "FOLDER": "there",
}


def test_the_environment_goes_before_the_defaults(parsed):
    assert parsed(**ENVIRONMENT) == {
        "max_rows": 64, "size": "large", "quiet": True, "origin": ["http://a", "http://b"], "folder": "there"
    }  # fmt: skip


def test_the_command_line_goes_before_the_environment(parsed):
    line = ["--max-rows", "1", "--size", "small", "--origin", "http://c", "--folder", "mine"]
    assert parsed(*line, **ENVIRONMENT) == {
        "max_rows": 1, "size": "small", "quiet": True, "origin": ["http://c"], "folder": "mine"
    }  # fmt: skip


@pytest.mark.parametrize("nothing", [{}, {"MAX_ROWS": "", "QUIET": ""}, {"MAX_ROWS": "tcp://10.0.0.1:8000"}],
                         ids=["unset", "empty", "what Kubernetes sets for a Service"])  # fmt: skip
def test_a_variable_that_says_nothing_leaves_the_default(parsed, nothing):
    assert parsed(**nothing) == DEFAULTS


@pytest.mark.parametrize(("variable", "text", "says"), [
    ("MAX_ROWS", "many", "FLSERVING_MAX_ROWS is 'many': invalid int value: 'many'"),
    ("SIZE", "huge", "FLSERVING_SIZE is 'huge': invalid choice: 'huge'"),
    ("QUIET", "perhaps", "FLSERVING_QUIET is 'perhaps': it is a switch, set it to 1 or 0"),
])  # fmt: skip
def test_a_wrong_variable_is_named(parsed, capsys, variable, text, says):
    with pytest.raises(SystemExit) as ended:
        parsed(**{variable: text})
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_value_out_of_its_bounds_names_the_variable_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLSERVING_MAX_BATCH_SIZE", "0")
    assert cli.main(["serve", "--registry", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("(from FLSERVING_MAX_BATCH_SIZE)\n")
    assert (
        cli.main(["serve", "--registry", str(tmp_path), "--max-batch-size", "8", "--workers", "0"])
        == 1
    )
    assert "FLSERVING" not in capsys.readouterr().err, "the command line has gone before it"


def test_a_wrong_value_of_the_command_line_names_no_variable(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLSERVING_MAX_BATCH_SIZE", "8")
    monkeypatch.setenv("FLSERVING_ORIGIN", "https://a.example")
    for option, wrong, says in (
        ("--max-batch-size", "0", "max_batch_size is 0"),
        ("--origin", "*", "origin '*' cannot"),
    ):
        assert cli.main(["serve", "--registry", str(tmp_path), option, wrong]) == 1
        shown = capsys.readouterr().err
        assert says in shown and "FLSERVING" not in shown, "the command line has gone before it"


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_every_option_says_what_it_is_for_and_has_a_variable_of_its_own(command):
    options = options_of(command)
    for action in options:
        assert len(action.help.split()) >= 2 and action.help != f"default {action.default}", (
            action.option_strings
        )
    names = [variable(action) for action in options]
    assert len(set(names)) == len(names), "a variable sets one option"
    assert not {"FLSERVING_TOKEN", "FLSERVING_CLOUD_TOKEN"} & {*names}, (
        "tokens are no options: every user sees those"
    )


def test_the_help_shows_a_default_of_zero_and_percent_signs_as_they_are(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    class Settings:
        """Settings.

        Args:
            rate: Share of 5 % of :class:`~flserving.registry.Registry`, e.g. ``0.5``. A second
                sentence.
            pem: PEM file,
                as a path.
        """

    texts = described(Settings)
    parser = Parser(prog="program")
    parser.add_argument("--rate", default=0, help=texts["rate"])
    assert "--rate RATE  share of 5 % of Registry, e.g. 0.5 (default 0)" in parser.format_help()
    assert texts["pem"] == "PEM file, as a path"


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.split()[0] == "flserving"
