"""Names of a TensorRT that a source file uses and a surface does not have, found by reading both."""

from __future__ import annotations

import ast

from tests.export.tensorrt_standin import Surface, bind, forms_of

# What the parameters and results are that the source can only call `Any`; any other one is an error.
PARAMETERS = {
    "trt": "trt",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
}
RESULTS = {
    "_module": "trt",
    "_logger": "ILogger",
    "_monitor": "IProgressMonitor",
    "_open": "ICudaEngine",
    "_settle_classic": "ITimingCache",
}
RTX_ONLY = "_settle_rtx"
PLAIN = {"severity"}
"""Parameters of callbacks that are only compared."""

CONVERSIONS = {"bytes", "int"}
"""What makes something plain of an object."""


class Reader(ast.NodeVisitor):
    """Follows what comes from the module through a source file; `wrong` tells what the surface does not have.

    A type is `trt`, `type Builder`, `Builder`, `Builder.create_network`, or empty for what is not the library's.
    """

    def __init__(self, tree: ast.Module, surface: Surface) -> None:
        self.functions = {
            node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
        }
        self.classes, self.enums = surface["classes"], surface["enums"]
        self.names = set(surface["names"].split())
        self.wrong: list[str] = []
        self.env: dict[str, str] = {}
        self.own: set[str] = set()
        self.function = ""

    def note(self, node: ast.AST, text: str) -> str:
        self.wrong.append(f"line {getattr(node, 'lineno', '?')}: {text}")
        return ""

    # Types of expressions.

    def type_of(self, node: ast.AST | None) -> str:
        match node:
            case None | ast.Constant():
                return ""
            case ast.Name(id=name):
                return self.env.get(name, "")
            case ast.Attribute(value=value, attr=name):
                owner = self.type_of(value)
                if isinstance(value, ast.Name) and value.id == "self" and name in self.own:
                    return ""
                return self.env.get(ast.unparse(node), "") or (self.member(node, owner, name) if owner else "")
            case ast.Call():
                return self.call(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.type_of(test)
                return self.type_of(body) or self.type_of(other)
            case ast.Compare(left=left, comparators=others):
                for part in (left, *others):
                    self.type_of(part)
                return ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.comprehension):
                self.bind(child.target, self.type_of(child.iter))
        for child in ast.iter_child_nodes(node):
            if (found := self.type_of(child)) and not found.startswith("trt"):
                self.note(node, f"{found} goes into {type(node).__name__}, where it is not followed")
        return ""

    def member(self, node: ast.AST, owner: str, name: str) -> str:
        kind, _, path = owner.rpartition(" ")
        if owner == "trt":
            if name in self.classes or name in self.enums:
                return f"type {name}"
            plain = name in self.names and not name[0].isupper()  # a data type or a function of the module
            return "" if plain or name == "__version__" else self.note(node, f"trt.{name}")
        if path in self.enums:
            known = name in {*self.enums[path].split(), "__members__"}
            return "" if known else self.note(node, f"{path}.{name}")
        if kind and f"{path}.{name}" in self.enums:
            return f"type {path}.{name}"
        signature = self.classes.get(path, {}).get(name)
        if signature is None:
            return self.note(node, f"{path}.{name}")
        return f"{path}.{name}" if not signature.startswith(":") else self.known(signature.removeprefix(":"))

    def known(self, result: str) -> str:
        return result.strip() if result.strip() in {*self.classes} - {"Dims"} else ""

    def call(self, node: ast.Call) -> str:
        function = self.type_of(node.func)
        given = [(keyword.arg or "", self.type_of(keyword.value)) for keyword in node.keywords]
        values = [self.type_of(value.value if isinstance(value, ast.Starred) else value) for value in node.args]
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            for name, found in [*zip(self.functions[node.func.id], values, strict=False), *given]:
                if found != PARAMETERS.get(name, found and "nothing of the library's"):
                    self.note(node, f"{node.func.id}({name}) is given {found}")
            return RESULTS.get(node.func.id, "")
        if not function:
            for found in (*values, *(found for _, found in given)):
                if found and not (isinstance(node.func, ast.Name) and node.func.id in CONVERSIONS):
                    self.note(node, f"{found} goes into {ast.unparse(node.func)}, where it is not followed")
            return ""
        path = function.removeprefix("type ")
        if path in self.enums:
            return ""
        owner, _, method = (f"{path}.__init__" if function.startswith("type ") else path).partition(".")
        signature = self.classes[owner].get(method, "")
        starred = any(isinstance(value, ast.Starred) for value in node.args)
        plain = isinstance(node.func, ast.Attribute) and self.type_of(node.func.value).startswith("type ")
        arguments = tuple(values[1:] if plain else values)  # as in Base.__init__(self)
        if not signature or (not starred and bind(signature, arguments, dict(given)) is None):
            self.note(node, f"{ast.unparse(node)}: {owner}.{method} takes {signature or 'nothing: it is not public'}")
        return owner if function.startswith("type ") else self.known(forms_of(signature)[0][1])

    # Statements.

    def bind(self, target: ast.AST, found: str) -> None:
        if isinstance(target, ast.Name | ast.Attribute) and (found or not self.env.get(ast.unparse(target))):
            self.env[ast.unparse(target)] = found
        elif found:
            self.note(target, f"{found} is unpacked, where it is not followed")

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Attribute) and (owner := self.type_of(target.value)):
            if not self.classes.get(owner, {}).get(target.attr, "").startswith(":"):
                self.note(node, f"{owner}.{target.attr} is no property")
            self.type_of(node.value)
        else:
            self.bind(target, self.type_of(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.type_of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.type_of(node.iter))
        for statement in node.body:
            self.visit(statement)

    def visit_Return(self, node: ast.Return) -> None:
        found = self.type_of(node.value)
        if found not in ("", RESULTS.get(self.function, "")):
            self.note(node, f"{self.function} returns {found}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.env = self.env, dict(self.env)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            name, hint = argument.arg, argument.annotation and ast.unparse(argument.annotation)
            if hint == "Any" and name not in {*PARAMETERS, *PLAIN}:
                self.note(node, f"{node.name}({name}): say in PARAMETERS what it is")
            if name != "self":
                self.env[name] = PARAMETERS.get(name, "") if hint == "Any" else ""
        if node.returns and ast.unparse(node.returns) == "Any" and node.name not in RESULTS:
            self.note(node, f"{node.name}: say in RESULTS what it returns")
        outer, self.function = self.function, node.name
        for statement in node.body:
            self.visit(statement)
        self.function = outer
        self.env = before | {name: found for name, found in self.env.items() if name.startswith("self.")}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.type_of(base) for base in node.bases if ast.unparse(base).startswith("trt.")]
        before, self.own = (self.env, self.own), set()
        base = bases[0].removeprefix("type ") if bases else ""
        methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
        for method in methods:
            signature = self.classes.get(base, {}).get(method.name)
            if base and signature is None:
                self.own.add(method.name)
            elif base and len(forms_of(signature or "")[0][0]) != len(method.args.args) - 1:
                self.note(method, f"{base}.{method.name} takes {signature}")
        self.env = {**self.env, "self": base, node.name: f"type {base}" if base else ""}
        for statement in node.body:
            self.visit(statement)
        self.env, self.own = before
        self.env[node.name] = f"type {base}" if base else ""

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self.type_of(node)
        else:
            super().generic_visit(node)


def unknown(source: str, surface: Surface) -> list[str]:
    """What `source` uses and the surface does not have; of TensorRT-RTX's own function only on TensorRT-RTX."""
    tree = ast.parse(source)
    reader = Reader(tree, surface)
    for node in tree.body:
        if getattr(node, "name", "") != RTX_ONLY or surface["api"] == "tensorrt_rtx":
            reader.visit(node)
    return reader.wrong
