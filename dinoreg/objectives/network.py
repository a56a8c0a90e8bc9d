"""A backbone with its heads, and which tokens go through which head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dinoreg.data.batch import Crops
from dinoreg.models.heads import HeadConfig, PrototypeHead
from dinoreg.models.vit import Features, ModelConfig, build_vit


class HeadedBackbone(nn.ModuleDict):
    """Student or teacher: modules "backbone", "dino_head" and, with heads of their own for patches, "ibot_head".

    A term of the objective, "dino" or "ibot", is a set of rows (tokens) and the head that they go through. Rows always
    come image by image, as in `Crops.global_crops.flatten(0, 1)`.
    """

    def __init__(
        self,
        model: ModelConfig,
        heads: Mapping[str, HeadConfig],
        terms: Mapping[str, Sequence[str]],
        *,
        attention: str,
        drop_path: bool,
    ) -> None:
        """terms: for each of `heads`, those that share it."""
        super().__init__({"backbone": build_vit(model, attention=attention, drop_path=drop_path)})
        self.update({name: PrototypeHead(model.size.embed_dim, cfg) for name, cfg in heads.items()})
        self.terms_by_head = terms
        self.head_of = {term: head for head in terms for term in terms[head]}

    def init_weights(self) -> None:
        for module in self.values():
            module.init_weights()  # type: ignore[operator]

    def look_at(self, part: Crops, *, masked: bool) -> Features:
        """Everything that the backbone says about the global crops, for those who look inside."""
        masks = part.masks.flatten(0, 1) if masked and "ibot" in self.head_of else None
        return self["backbone"]([part.global_crops.flatten(0, 1)], [masks])[0]

    def tokens(
        self, part: Crops, *, masked: bool, local: bool, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the losses look at: class tokens (n, D) of all crops seen, and the masked patches (m, D) of global ones.

        Seen are the global crops, masked if so wanted, and in the same pass the local crops if so wanted. Without iBOT
        nothing is masked, and without DINO local crops are left out, since nothing would look at them. Global crops
        come first, so that drop path keeps the same of their rows with and without the local ones.
        """
        ibot = "ibot" in self.head_of
        images: list[Tensor] = [part.global_crops.flatten(0, 1)]
        masks: list[Tensor | None] = [part.masks.flatten(0, 1) if masked and ibot else None]
        if local and "dino" in self.head_of and part.local_crops.shape[1]:
            images.append(part.local_crops.flatten(0, 1))
            masks.append(None)
        patches = part.masked_index if ibot else part.masked_index[:0]
        return self["backbone"].forward_tokens(images, masks, patches, generator)  # type: ignore[operator]

    def rows(self, cls: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """The tokens of each term."""
        return {term: rows for term, rows in (("dino", cls), ("ibot", patches)) if term in self.head_of}

    def bottlenecks(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first, narrow half of the heads, for the rows of each term."""
        return self._split(rows, lambda head, x: head.mlp(x))

    def logits(self, bottlenecks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other half, (n, K)."""
        return self._split(bottlenecks, lambda head, x: head.last_layer(x))

    def last_layer(self, term: str) -> nn.Module:
        """The second half of a term's head."""
        return self[self.head_of[term]].last_layer  # type: ignore[return-value]

    def _split(self, rows: Mapping[str, Tensor], run: Callable[[PrototypeHead, Tensor], Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for head, together in self.by_head(rows).items():
            terms = self.terms_by_head[head]
            pieces = run(self[head], together).split([len(rows[term]) for term in terms])  # type: ignore[arg-type]
            out.update(zip(terms, pieces, strict=True))
        return out

    def by_head(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the terms that share a head, one after the other: a head runs once, and is gathered once."""
        return {head: torch.cat([rows[term] for term in terms]) for head, terms in self.terms_by_head.items()}
