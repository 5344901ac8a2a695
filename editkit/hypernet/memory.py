"""The memory of a hypernetwork in bytes, in a run and in training.

The figures model the tensors that a pass keeps. Their constants were measured with GPT-2 on a CPU
and include a reserve for other families.
"""

from __future__ import annotations

from editkit.hypernet.measure import ROWS
from editkit.hypernet.network import NetworkOptions, num_bytes
from editkit.hypernet.options import TrainingOptions
from editkit.hypernet.ridge_network import TOKENS, RidgeOptions
from editkit.hypernet.ridge_network import num_bytes as ridge_num_bytes
from editkit.resources.workload import (
    LOGITS,
    PROMPT,
    REQUEST,
    TARGET_TOKENS,
    TrainingMemory,
    Workload,
)

# Copies of a matrix's factors while a hypernetwork transforms them. Its hidden layer has half as
# many.
TRANSFORMED = 8


def gradient_bytes(
    work: Workload, network: NetworkOptions, edits: int, *, num_learning: int = 1
) -> float:
    """The bytes of a forward and backward pass of some edits, its factors in float32, and the
    hypernetwork's computation.

    Args:
        num_learning: number of matrices whose computation autograd keeps.
    """
    tokens = edits * REQUEST
    hidden = TRANSFORMED / 2 * min(network.rank, work.both)
    learning = num_learning * (TRANSFORMED * work.both + hidden)
    factors = 4 * tokens * (work.num_matrices * 4 * work.both + learning)
    passes = work.kept(tokens, work.blocks_with_gradient) + work.forward(tokens, REQUEST)
    return passes + factors + work.logits(edits * PROMPT[1])


def network_bytes(work: Workload, network: NetworkOptions) -> float:
    """The tensors of a new hypernetwork for these matrices."""
    return float(num_bytes(work.shapes, network))


def training_bytes(
    work: Workload,
    network: NetworkOptions,
    options: TrainingOptions,
    *,
    is_gpu: bool,
    reading: float,
) -> TrainingMemory:
    """The bytes of a training step, the validation, and a checkpoint, whose copies are on the host.

    Args:
        reading: the temporary bytes for loading a model.
    """
    one = network_bytes(work, network)
    rank = min(network.rank, work.both)
    is_chain, tokens = options.sequence > 1, REQUEST * options.locality_texts
    # Each row of a chain is measured together with one of its earlier edits.
    rows = min(options.at_once, options.accumulate) * (2 if is_chain else 1)
    validated = min(ROWS, options.validation)
    factors = 4 * work.num_matrices * REQUEST * work.both * options.sequence  # of a chain's edits
    logits = tokens * work.architecture.vocabulary * 4  # of all tokens of an edit's locality texts
    locality = (2 * LOGITS + 2) * logits + work.kept(tokens, work.blocks_with_gradient)
    step = gradient_bytes(work, network, rows, num_learning=work.num_matrices) + rows * locality
    optimiser = 2 * rank * work.both * 4  # temporary tensors of Adam
    copied = 3 * one
    phases = {
        "weights read": reading,
        "step": step + (options.accumulate * factors if is_chain else 0) + optimiser,
        "validation": gradient_bytes(work, network, validated)
        + validated * ((LOGITS + 2) * logits + factors),
    }
    if not is_gpu:
        phases["checkpoint"] = copied + reading
    return TrainingMemory(
        kept=4 * one,  # the network, its gradient, and two moments of Adam
        on_host=2 * one,  # the initial and the best network
        copied=copied,
        phases=phases,
        saving={"step": "a lower editor.train.at_once"},
    )


def ridge_network_bytes(work: Workload, network: RidgeOptions) -> float:
    """The tensors of a new network of MALMEN for these matrices."""
    return float(ridge_num_bytes(work.shapes, network))


def ridge_training_bytes(
    work: Workload,
    network: RidgeOptions,
    options: TrainingOptions,
    *,
    mini_batch: int,
    is_gpu: bool,
    reading: float,
) -> TrainingMemory:
    """As `training_bytes`, of MALMEN and RLEdit: a batch's features and updates in factors, and the
    sum of the updates of a trajectory.
    """
    one, size = ridge_network_bytes(work, network), min(network.rank, work.both)
    tokens = TARGET_TOKENS * options.accumulate
    # Inputs and gradients, V and its gradient in float32; the right factors and theirs in float64.
    features = work.num_matrices * tokens * work.both * (4 + 4 + 4 + 8 + 8)
    solving = 3 * 8 * tokens**2
    transformed = 4 * TOKENS * TRANSFORMED * network.blocks * (work.both + size)
    rows = REQUEST * mini_batch
    gradient = work.kept(rows, work.blocks_with_gradient) + work.logits(rows)
    texts = REQUEST * options.locality_texts
    logits = texts * work.architecture.vocabulary * 4
    losses = options.at_once * (
        (2 * LOGITS + 2) * logits + work.kept(texts + REQUEST, work.blocks_with_gradient)
    )
    totals = 2 * 4 * work.num_matrices * work.matrix if options.sequence > 1 else 0
    copied = 3 * one
    phases = {
        "weights read": reading,
        "step": features + totals + max(gradient, losses, solving, transformed),
    }
    if not is_gpu:
        phases["checkpoint"] = copied + reading
    return TrainingMemory(
        kept=4 * one,
        on_host=2 * one,
        copied=copied,
        phases=phases,
        saving={"step": "a lower editor.train.at_once or editor.train.accumulate"},
    )
