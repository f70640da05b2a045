"""What a user would start with torchrun, or with accelerate launch: a trace and a fit over all processes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ntkops


def main() -> None:
    """Compare with one process, and write what was found."""
    if "--accelerate" in sys.argv:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration

        # Even batches would repeat samples to give every process as many.
        config = DataLoaderConfiguration(even_batches=False)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        rank, count = accelerator.process_index, accelerator.num_processes
    else:
        dist.init_process_group("gloo")
        rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    x, y = torch.randn(23, 5).double(), torch.randn(23, 3).double()
    if "--accelerate" in sys.argv:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
        model, shard = accelerator.prepare(model, loader)
        model = accelerator.unwrap_model(model)  # out of DistributedDataParallel
        labels = torch.cat([y[a : a + 4] for a in range(4 * rank, 23, 4 * count)])
    else:
        shard, labels = x[rank::count], y[rank::count]
    K = ntkops.ntk(model, shard, group="world")
    whole = ntkops.ntk(model, x)
    trace = float(ntkops.trace(K, method="exact")) / float(ntkops.trace(whole, method="exact")) - 1
    generator = torch.Generator().manual_seed(3)
    fit = ntkops.KernelRidge(1e-2, tol=1e-11, generator=generator).fit(K, labels)
    new = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    reference = ntkops.KernelRidge(1e-2, method="cholesky").fit(whole, y).predict(whole.cross(new))
    error = float((fit.predict(K.cross(new)) - reference).abs().max() / reference.abs().max())
    found = {"ranks": count, "samples": K.num_samples, "trace": abs(trace), "prediction": error}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
