"""What tests of more than one folder share. What one folder alone needs lies in that folder.

Networks and data to train:
    tiny            a network of 440 k MACs, `--model tests.support.tiny:net`, and its costs by hand
    own_tasks       tasks of a user's own that are no pictures: tones, and two inputs with two outputs
    shapes          pictures of discs and squares with their masks, and a U-Net
    objects         pictures with objects and their boxes, and a detector
    shared          what is taken from `../shared`, where that is there

Graphs and engines:
    classifiers     tiny ONNX classifiers, and engines whose times are known
    residual        a residual classifier with all that the precisions treat apart
    greedy          valid graphs that take more memory, or more time, than there is
    fake_gpu        a GPU of NumPy: CUDA's runtime and TensorRT as far as running a plan takes

Bundles and documents:
    bundles         a small valid bundle for any target, made by hand
    bundle_commands the bundle's commands, and changes after which hashes are right again
    schemas         a document against the JSON Schema that ships with the package

Processes and commands:
    processes       a function in processes that train together
    kills           the miniature's command, killed at a chosen moment, and what the next run makes of it
"""
