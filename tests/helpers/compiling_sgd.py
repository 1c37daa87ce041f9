"""An optimizer that compiles, for tests of what a run leaves eager."""

import torch

GRAPHS = []


def counting(graph: torch.fx.GraphModule, _: list) -> object:
    GRAPHS.append(graph)
    return graph.forward


@torch.compile(backend=counting)
def shrunk(weight: torch.Tensor) -> torch.Tensor:
    return weight * 0.999


class CompilingSGD(torch.optim.SGD):
    """SGD with a function compiled at import, and one in its step, as torchao's optimizers have them."""

    @torch.no_grad()
    def step(self, closure: object = None) -> object:
        @torch.compile(dynamic=False, backend=counting)
        def grown(weight: torch.Tensor) -> torch.Tensor:
            return weight * 1.001

        for group in self.param_groups:
            for weight in group["params"]:
                weight.copy_(torch.compile(grown, backend=counting)(shrunk(weight)))
        return super().step(closure)
