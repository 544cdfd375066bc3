"""bfloat16 as a Zarr v3 data type.

`bfloat16` is a registered Zarr v3 data type that zarr-python does not ship. This class is found by
the entry point group `zarr.data_type`, so that every program with retrace installed opens such
arrays as NumPy arrays of `ml_dtypes.bfloat16`, the type that JAX and tensorstore use as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, overload

import ml_dtypes
import numpy as np
from zarr.core.common import JSON, ZarrFormat
from zarr.core.dtype.common import DTypeConfig_V2, DTypeJSON, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import TBaseDType
from zarr.dtype import Float32, ZDType, data_type_registry

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined]
except ImportError:  # before zarr 3.3, which moved it
    from zarr.dtype import DataTypeValidationError

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """Zarr data type of 16-bit brain floating point numbers (little-endian in memory)."""

    dtype_cls = type(BFLOAT16)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes of one number."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: TBaseDType) -> Self:
        """The data type of a NumPy dtype, which must be `ml_dtypes.bfloat16`."""
        if dtype != BFLOAT16:
            raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected bfloat16.")
        return cls()

    def to_native_dtype(self) -> Any:
        """`numpy.dtype(ml_dtypes.bfloat16)`."""
        return BFLOAT16

    @classmethod
    def _check_json_v2(cls, data: DTypeJSON) -> TypeGuard[DTypeConfig_V2[str, None]]:
        return False  # Zarr v2 has no bfloat16

    @classmethod
    def _check_json_v3(cls, data: DTypeJSON) -> TypeGuard[Literal["bfloat16"]]:
        return data == cls._zarr_v3_name

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError("Zarr v2 has no bfloat16 data type.")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if cls._check_json_v3(data):
            return cls()
        raise DataTypeValidationError(f"Invalid JSON representation of bfloat16: {data!r}.")

    @overload
    def to_json(self, zarr_format: Literal[2]) -> DTypeConfig_V2[str, None]: ...
    @overload
    def to_json(self, zarr_format: Literal[3]) -> str: ...
    def to_json(self, zarr_format: ZarrFormat) -> DTypeConfig_V2[str, None] | str:
        """The name by which Zarr v3 metadata calls this type."""
        if zarr_format == 2:
            raise ValueError("Zarr v2 has no bfloat16 data type.")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        """`data` as a bfloat16 scalar."""
        if not self._check_scalar(data):
            raise TypeError(f"Cannot convert {data!r} to bfloat16.")
        return BFLOAT16.type(data)

    def default_scalar(self) -> Any:
        """Zero, the fill value of an array that names none."""
        return BFLOAT16.type(0)

    # Fill values read and write as those of float32, of which every bfloat16 is one.
    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> Any:
        """A fill value as Zarr metadata holds it, as a scalar."""
        return BFLOAT16.type(Float32().from_json_scalar(data, zarr_format=zarr_format))

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> JSON:
        """A scalar as a fill value for Zarr metadata."""
        return Float32().to_json_scalar(np.float32(self.cast_scalar(data)), zarr_format=zarr_format)


def register() -> None:
    """Make zarr-python know the type, also where the package's entry points are not installed."""
    data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
