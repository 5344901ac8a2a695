"""Second moments of the keys of several matrices (covariance statistics), from one pass over the
texts. A pass stops above the last matrix.

The second moment is the C of Meng et al. 2022 (arXiv 2202.05262), Eq. 2. Products are computed in
float32 or bfloat16 and summed in float64; the published code sums 1e7 and more outer products in
float32. All tokens count except padding. A tokenizer's own BOS counts as well, because its key also
occurs in edit prompts. As in the published code, a document is a sequence of its own and is
truncated to its first `context_length` tokens. Documents are neither split into several sequences
nor packed.

The texts are divided into blocks of `BLOCK` documents, and the blocks are distributed over `PARTS`
parts. A part sums its blocks in order, and the total sums the parts in order. The bits therefore do
not depend on interruptions or on the process that computes a part. They do depend on the kind of
machine and the number of threads, because the library rounds a product.

Shape letters: B sequences, T tokens of the longest sequence, M tokens without padding, I d_in, R
rows and L columns of a block of the triangle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

PARTS = 8  # the largest number of processes that can share the work
# Documents that are sorted by length together. A larger block has less padding, a smaller one saves
# its sums more often.
BLOCK = 256
# Keys per product. Adding a product in float64 costs as much as multiplying 400 keys.
PRODUCT_TOKENS = 8192
SMALL_BATCH = 512  # from this number of tokens on, a pass uses a processor well
MOST_PADDING = 1 / 16  # largest share of padding in a pass that is not small
# Of the triangle: 53 % of the products are computed, in blocks that are large enough to be fast.
ROW_BLOCKS, LEAST_ROWS = (16, 256)

Products = Literal["float32", "bfloat16"]


class TriangleSum:
    """The sum over tokens of k k^T in float64. Only the blocks on and below the diagonal are
    computed and stored.
    """

    def __init__(self, blocks: Sequence[torch.Tensor]) -> None:
        self.blocks = tuple(
            blocks
        )  # (R, L) each, where L is the number of columns up to the diagonal

    @staticmethod
    def zeros(size: int, device: torch.device | str = "cpu") -> TriangleSum:
        rows = max(LEAST_ROWS, -(-size // ROW_BLOCKS))
        borders = [(first, min(first + rows, size)) for first in range(0, size, rows)]
        return TriangleSum(
            [
                torch.zeros(last - first, last, dtype=torch.float64, device=device)
                for first, last in borders
            ]
        )

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def add_products(self, keys_MI: torch.Tensor, products: Products) -> None:
        """Adds keys^T keys."""
        # Only on CUDA, and since torch 2.8, is a bfloat16 product accumulated and returned in
        # float32.
        is_mixed = (
            products == "bfloat16"
            and keys_MI.device.type == "cuda"
            and "dtype" in torch.ops.aten.mm.overloads()
        )
        wide = torch.promote_types(keys_MI.dtype, torch.float32)
        if products == "bfloat16":
            keys_MI = keys_MI.to(torch.bfloat16)
        if not is_mixed:
            keys_MI = keys_MI.to(wide)
        for block_RL in self.blocks:
            last = block_RL.shape[1]
            rows_MR, columns_ML = keys_MI[:, last - block_RL.shape[0] : last], keys_MI[:, :last]
            block_RL.add_(
                torch.mm(rows_MR.T, columns_ML, out_dtype=torch.float32)
                if is_mixed
                else rows_MR.T @ columns_ML
            )

    def add(self, other: TriangleSum) -> None:
        for mine_RL, others_RL in zip(self.blocks, other.blocks, strict=True):
            mine_RL.add_(others_RL)

    def dense(self) -> torch.Tensor:
        """The sum as a bitwise symmetric matrix, (I, I)."""
        size = self.blocks[-1].shape[1]
        dense_II = self.blocks[0].new_empty((size, size))
        for block_RL in self.blocks:
            last = block_RL.shape[1]
            first = last - block_RL.shape[0]
            left, corner = block_RL[:, :first], block_RL[:, first:]
            dense_II[first:last, :first] = left
            dense_II[:first, first:last] = left.T
            dense_II[first:last, first:last] = corner.tril() + corner.tril(-1).T
        return dense_II


@dataclass(frozen=True, eq=False)
class MomentSum:
    """The sum over tokens of k k^T, (I, I) float64, and the number of tokens."""

    sum_II: torch.Tensor
    num_tokens: int


@dataclass(slots=True, eq=False)
class PartSum:
    """The sums of the first blocks of one part."""

    sums: Mapping[str, TriangleSum]  # by module
    num_blocks: int = 0
    num_tokens: int = 0


class Collector:
    """Runs texts through a model and sums the products of the keys of some matrices."""

    def __init__(
        self,
        model: EditableModel,
        modules: Sequence[str],
        *,
        context_length: int,
        batch_tokens: int,
        products: Products = "float32",
    ) -> None:
        """`batch_tokens` bounds the tokens of a pass, including padding. It changes results only by
        rounding.
        """
        self.model, self.modules = model, tuple(modules)
        self._context_length, self._batch_tokens, self._products = (
            context_length,
            batch_tokens,
            products,
        )
        rows = keys_at_once(context_length, batch_tokens)
        self._keys_MI = {
            module: torch.empty(rows, self._size(module), dtype=model.dtype, device=model.device)
            for module in self.modules
        }

    def empty(self) -> PartSum:
        """The sums of no block."""
        return PartSum(
            {
                module: TriangleSum.zeros(self._size(module), self.model.device)
                for module in self.modules
            }
        )

    def add_block(self, total: PartSum, texts: Sequence[str]) -> None:
        """Adds the keys of a block's texts. The result depends only on them and on `total`."""
        held = 0
        with torch.no_grad():
            for batch in self._batches(texts):
                prompts = pad(batch, device=self.model.device)
                is_token_BT = prompts.mask_BT.bool()
                num_tokens = sum(map(len, batch))
                if held + num_tokens > len(self._keys_MI[self.modules[0]]):
                    held = self._multiply(total, held)
                with capture(self.model, inputs=self.modules) as captured:
                    self.model.final_hidden(prompts)
                for module in self.modules:
                    self._keys_MI[module][held : held + num_tokens] = captured.inputs[module][
                        is_token_BT
                    ]
                held += num_tokens
            self._multiply(total, held)
        total.num_blocks += 1

    def _multiply(self, total: PartSum, held: int) -> int:
        """Adds the products of the first `held` keys. Returns the number of remaining keys, 0."""
        for module, sum_of in total.sums.items():
            sum_of.add_products(self._keys_MI[module][:held], self._products)
        total.num_tokens += held
        return 0

    def _batches(self, texts: Sequence[str]) -> Iterator[list[list[int]]]:
        """Token ids in batches of similar length. A batch has at most `batch_tokens` tokens
        including padding, or a single text.
        """
        encoded = self.model.tokenizer(
            list(texts), truncation=True, max_length=self._context_length
        )["input_ids"]
        batch: list[list[int]] = []
        num_tokens = 0
        for ids in sorted(filter(None, encoded), key=len):
            area = len(ids) * (len(batch) + 1)
            is_padded = (
                num_tokens >= SMALL_BATCH and area - num_tokens - len(ids) > MOST_PADDING * area
            )
            if batch and (area > self._batch_tokens or is_padded):
                yield batch
                batch, num_tokens = [], 0
            batch.append(ids)
            num_tokens += len(ids)
        if batch:
            yield batch

    def _size(self, module: str) -> int:
        return self.model.weight(module).shape[1]


def keys_at_once(context_length: int, batch_tokens: int) -> int:
    """The number of keys of a module that are held at a time."""
    return max(PRODUCT_TOKENS, batch_tokens, context_length)


def blocks_of(part: int, num_documents: int) -> list[range]:
    """The documents of each block of a part, which depend only on the number of documents."""
    borders = range(0, num_documents, BLOCK)
    return [range(start, min(start + BLOCK, num_documents)) for start in borders[part::PARTS]]


def collect(
    model: EditableModel,
    modules: Sequence[str],
    texts: Sequence[str],
    *,
    context_length: int,
    batch_tokens: int,
    products: Products = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, MomentSum]:
    """Sums of k k^T at the inputs of `modules`, by module, computed in memory by this process.

    `stats.parts` computes the same sums with interruptions.

    Args:
        progress: gets the number of processed documents and the total number.

    Raises:
        ConfigError: the texts have no tokens.
    """
    collector = Collector(
        model, modules, context_length=context_length, batch_tokens=batch_tokens, products=products
    )
    total, done = collector.empty(), 0
    for part in range(PARTS):
        blocks = blocks_of(part, len(texts))
        part_sum = collector.empty() if blocks and part > 0 else total
        for block in blocks:
            collector.add_block(part_sum, [texts[index] for index in block])
            done += len(block)
            if progress is not None:
                progress(done, len(texts))
        if part_sum is not total:
            for module in modules:
                total.sums[module].add(part_sum.sums[module])
            total.num_tokens += part_sum.num_tokens
    require_tokens(total.num_tokens)
    return {module: MomentSum(total.sums[module].dense(), total.num_tokens) for module in modules}


def require_tokens(num_tokens: int) -> None:
    """Raises ConfigError for texts without tokens."""
    if not num_tokens:
        raise ConfigError(
            message(
                "stats",
                "the texts have no tokens",
                fix="raise stats.num_documents, or choose another source",
            )
        )
