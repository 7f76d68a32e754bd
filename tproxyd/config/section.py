"""What every mapping of the file has in common. Pure."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Section(BaseModel):
    """A mapping of the file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    not_yet: ClassVar[frozenset[str]] = frozenset()
    """Keys of the design that this version lacks."""


class Sparse(Section):
    """A mapping whose keys mean nothing but by being there: written out without those that are not."""

    @model_serializer(mode="wrap")
    def _only_what_is_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value}
