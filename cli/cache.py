"""`tav cache`: the inversions that are kept, and room made of them."""

from datetime import datetime

from typer import Typer

from tav_peft.cli import console, options

app = Typer(no_args_is_help=True, help="List or clear the inversions that are kept for the next edit.")


@app.command("ls")
def list_(as_json: options.AsJson = False) -> None:
    """List the inversions that are kept, used last first."""
    from tav_peft.inversion_cache import InversionCache

    cache = InversionCache()
    entries = cache.entries()
    if as_json:
        told = [{"file": k.path, "bytes": k.bytes, "used": k.used, **k.info} for k in entries]
        console.print_json(
            {"folder": cache.folder, "bytes": sum(k.bytes for k in entries), "inversions": told}
        )
        return
    rows = [
        (
            str(kept.info.get("name") or "latents"),
            str(kept.info.get("base", "?")),
            f"{kept.info.get('method', '?')}, {kept.info.get('steps', '?')} steps",
            f"{datetime.fromtimestamp(kept.used):%Y-%m-%d %H:%M}",
            console.size_text(kept.bytes),
        )
        for kept in entries
    ]
    if rows:
        console.print_table(("clip", "base", "inversion", "used", "size"), rows)
    total = console.size_text(sum(kept.bytes for kept in entries))
    console.say(f"{len(entries)} inversions, {total}, in {cache.folder}")


@app.command("clear")
def clear(as_json: options.AsJson = False) -> None:
    """Remove every inversion that is kept; they are made again when they are needed."""
    from tav_peft.inversion_cache import InversionCache

    cache = InversionCache()
    count, freed = len(cache.entries()), cache.clear()
    if as_json:
        console.print_json({"removed": count, "bytes": freed})
    else:
        console.say(f"{count} inversions removed, {console.size_text(freed)} free again.")
