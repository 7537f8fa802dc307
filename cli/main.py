"""Assembles `tav` and turns what can go wrong into one clear line and an exit code."""

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tav_peft.cli import (
    bundle,
    cache,
    cast,
    control,
    demo,
    diff,
    edit,
    export,
    extract,
    import_,
    info,
    invert,
    merge,
    plan,
    publish,
    recipes,
    report,
    resize,
    score,
    suite,
    tune,
    verify,
)
from tav_peft.cli.console import complain, out
from tav_peft.errors import TavError
from tav_peft.foreign import is_out_of_memory


class Commands(TyperGroup):
    """The commands, with a user's mistakes reported in place of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command: 0 done, 1 it could not, 2 a usage error (by Typer), 130 stopped by Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("stopped")
            raise typer.Exit(130) from None
        except Exception as error:
            message = _in_one_line(error)
            if message is None:
                raise
            complain(message)
            raise typer.Exit(1) from None


def _in_one_line(error: Exception) -> str | None:
    """Say what a person can do about an error, or None for a bug, which wants its traceback."""
    if isinstance(error, TavError):
        return str(error)
    # safetensors reports a full disk in its own exception, with the system's number in the text
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "(os error 28)" in str(error):
        return "The disk is full. Free some space, then run the same command again."
    if isinstance(error, OSError) and error.filename and error.errno != errno.EPIPE:
        return f"{error.filename}: {error.strerror}."
    if is_out_of_memory(error):
        return "Out of memory. Use fewer frames or a smaller size, or tune with --recipe small-gpu."
    return None


app = typer.Typer(
    name="tav",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune")(tune.command)
app.command("edit")(edit.command)
app.command("export")(export.command)
app.command("import")(import_.command)
app.command("invert")(invert.command)
app.command("control")(control.command)
app.command("info")(info.command)
app.command("diff")(diff.command)
app.command("extract")(extract.command)
app.command("resize")(resize.command)
app.command("cast")(cast.command)
app.command("merge")(merge.command)
app.command("plan")(plan.command)
app.command("bundle")(bundle.command)
app.command("publish")(publish.command)
app.command("report")(report.command)
app.command("score")(score.command)
app.command("suite")(suite.command)
app.command("verify")(verify.command)
app.add_typer(cache.app, name="cache")
app.command("recipes")(recipes.command)
app.command("demo")(demo.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tav_peft import __version__

        out.print(f"tav-peft {__version__}", soft_wrap=True)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Tune a text-to-image model on one clip, keep a small adapter, edit the clip by prompt."""


def main() -> None:
    """Run `tav`: the console entry."""
    app()
