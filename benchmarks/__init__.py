"""The measurements behind README.md and docs/. Each runs from the root of a clone as a module:

    python -m benchmarks.speed.step                a training step of an MLP, over its size
    python -m benchmarks.speed.growth              the same over width, depth, batch, classes
    python -m benchmarks.speed.kinds               a step of CNNs, ResNets, transformers, GCNs
    python -m benchmarks.speed.recipe              a step with norms as modules of their own
    python -m benchmarks.speed.memory              memory and time over depth, streaming
    python -m benchmarks.speed.kernels             the kernels alone
    python -m benchmarks.speed.one_core            matrix products, and what Python costs
    python -m benchmarks.speed.low_precision       float16, and int8 weight gradients
    python -m benchmarks.accuracy.time_to_accuracy seconds of training until an accuracy
    python -m benchmarks.accuracy.seeds            a run of examples/training over several seeds
    python -m benchmarks.paper                     the experiments of arXiv 1906.04554
    python -m benchmarks.harness.gpu               all that is measured on a GPU
    python -m benchmarks.harness.collect           takes its results over
    python -m benchmarks.harness.readme            writes the figures of the pages

To time a model of yours, hand its steps to the same timer:

    from benchmarks.harness.steps import AutogradStep
    from benchmarks.harness.timing import beside_backprop, interleaved

    sides = {"backprop": plain, "fastdfa": fastdfa.DFA(model)}
    steps = {name: AutogradStep(side, side, x, y) for name, side in sides.items()}
    print(beside_backprop(interleaved(steps, rounds=9, seconds=0.3)))
"""
