"""For the reference: shows the options that a function takes by `Unpack` as `help()` does, each with its default."""

import inspect
from pydoc import locate
from typing import Any

import griffe


class SharedOptions(griffe.Extension):
    """Signature and docstring of the function itself, as `mechunlearn.options.with_options` has made them."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        for parameter in [p for p in func.parameters if "Unpack[" in str(p.annotation)]:
            function: Any = locate(func.path)
            func.docstring = griffe.Docstring(inspect.getdoc(function) or "", parent=func)
            del func.parameters[parameter.name]
            for shown in inspect.signature(function).parameters.values():
                if shown.name not in func.parameters:
                    func.parameters.add(_parameter(shown))


def _parameter(shown: inspect.Parameter) -> griffe.Parameter:
    """Functions by their names, other defaults as they are written."""
    default = shown.default
    name = getattr(getattr(default, "func", default), "__name__", None)
    annotation = inspect.formatannotation(shown.annotation).replace("collections.abc.", "").replace("pathlib.", "")
    kind = griffe.ParameterKind.keyword_only
    return griffe.Parameter(shown.name, annotation=annotation, kind=kind, default=name or repr(default))
