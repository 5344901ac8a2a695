"""`editkit certify` and `editkit verify`: numbers that can be checked by others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def certify(
    run: Annotated[Path, typer.Argument(help="Folder of a complete run: outputs/.../seed<k>.")],
    to: Annotated[
        Path | None,
        typer.Option(help="File to write. By default certificate.json in the run's folder."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Private key of OpenSSH that signs it; without one, digests alone."),
    ] = None,
) -> None:
    """Write a certificate of a run: configuration, code, inputs, files and numbers under digests.

    With --key it is signed by ssh-keygen. A chain of digests shows that the file is whole; only a
    signature shows who stands behind it.
    """
    from editkit.certify.certificate import NAME
    from editkit.certify.certificate import certify as write
    from editkit.certify.signature import fingerprint_of

    made = write(run, to or run / NAME, key=key)
    typer.echo(f"written: {made.path} ({len(made.section('numbers'))} numbers)")
    typer.echo(f"digest: {made.digest}")
    signature = made.content.get("signature")
    typer.echo(f"signed by {fingerprint_of(signature)}" if signature else "not signed")


def verify(
    file: Annotated[Path, typer.Argument(help="A certificate.")],
    run: Annotated[
        Path | None,
        typer.Option(help="The run's folder. By default that of the certificate."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Public key of OpenSSH that must have signed it."),
    ] = None,
    rerun: Annotated[
        float | None,
        typer.Option(
            help="Share of the measurements that is recomputed from the run's folder: 0.05."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the choice of measurements; a new one for each call by default."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a recomputed number.", min=0)
    ] = 1e-6,
    device: Annotated[
        str | None, typer.Option(help="Where it is recomputed; cpu by default.")
    ] = None,
) -> None:
    """Check a certificate: its chain, its signature, the run's files, with --rerun its numbers.

    The exit code is 1 if anything differs.
    """
    from editkit.certify.verify import verify as check

    made = check(file, run=run, key=key, share=rerun, seed=seed, tolerance=tolerance, device=device)
    for problem in made.problems:
        typer.echo(f"differs: {problem}")
    if made.problems:
        raise typer.Exit(1)
    typer.echo(f"chain: whole, digest {made.certificate.digest}")
    typer.echo(f"signature: {made.signer or 'none, so that anybody may have written the file'}")
    typer.echo(f"files: {'as certified' if made.run else 'not compared, there is no run folder'}")
    if again := made.rerun:
        typer.echo(
            f"recomputed: {len(again.pairs)} values of {len(again.units)} of {again.possible}"
            f" measurements, all equal (--seed {again.seed})"
        )
        for unit in again.units:
            typer.echo(f"  {unit}")
