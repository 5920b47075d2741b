"""The sentences of glm_core in Chinese: errors, warnings and notes, found by the shape of the English ones.

glm_core speaks English only, since its sentences also go into job databases, manifests and terminals. A screen
translates what it shows: the English template that a sentence was made from is found again, and its parts
(names, paths, numbers) are put into the Chinese one as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from string import Formatter

LONGEST = 6000  # characters; no sentence of the program has as many
MOST_SENTENCES = 24

# English template -> Chinese template. {} is a part, {{ and }} are braces that are text, {0} and {1} where the
# order differs; {:t} is a part in the program's own words, which is translated too. Other parts stay as they are.
SENTENCES: dict[str, str] = {
    # --- settings: folders
    "The workspace {} lies inside the program's own folder.": "工作区 {} 位于程序自身的文件夹中。",
    "Set GLM_WORKSPACE to a folder elsewhere, for example ~/.glm-workbench.": "请把 GLM_WORKSPACE 设为其他文件夹，例如 ~/.glm-workbench。",
    "The workspace {} cannot be written: {}.": "工作区 {} 无法写入：{:t}。",
    "Set GLM_WORKSPACE to a folder you may write to.": "请把 GLM_WORKSPACE 设为有写入权限的文件夹。",
    "The {} {} is outside the folders this workbench may read ({}).": "{:t} {} 不在本工作台允许读取的文件夹内（{}）。",
    "Move it into one of them, or add its folder to {} and start again.": "请移到其中一个文件夹，或把所在文件夹加入 {} 后重新启动。",
    "There is no {} {}.": "没有{:t} {}。",
    "Check the spelling, and that the disk is mounted.": "请检查路径是否正确、磁盘是否已挂载。",
    # --- checkpoints
    "There is no folder {}.": "没有文件夹 {}。",
    "{} rows in a row failed, the last one with: {}": "连续 {} 行失败，最后一行的原因：{:t}",
    "Load the model again, then resume the job and retry the failed rows.": "请重新加载模型，然后继续任务并重试失败的行。",
    "The files in {} are damaged ({}: {}).": "{} 中的文件已损坏（{}：{}）。",
    "Copy the checkpoint again from its source.": "请从来源重新复制检查点。",
    "temperature is {}.": "temperature 为 {}。",
    "Choose 0 (greedy), or 0.001 and more.": "请选择 0（贪心）或不小于 0.001 的值。",
    "seed is {}.": "seed 为 {}。",
    "Choose a whole number from 0 to {}.": "请选择 0 到 {} 之间的整数。",
    "See the log; `python -m glm_core doctor` says whether something is missing.": "请查看日志；`python -m glm_core doctor` 会说明缺少什么。",
    "Check the path of the checkpoint.": "请检查检查点的路径。",
    "{} has no config.json.": "{} 中没有 config.json。",
    "Choose the folder that holds config.json and the weights.": "请选择包含 config.json 和权重文件的文件夹。",
    "{} cannot be read: {}.": "无法读取 {}：{:t}。",
    "Copy config.json again from its source.": "请从来源处重新复制 config.json。",
    "{} holds no object.": "{} 的内容不是 JSON 对象。",
    "config.json says model_type {}; this version loads 'chatglm' (ChatGLM2, ChatGLM3).": "config.json 中的 model_type 为 {}；此版本只能加载 'chatglm'（ChatGLM2、ChatGLM3）。",
    "config.json has no padded_vocab_size: this looks like ChatGLM-6B, which is not loaded yet.": "config.json 中没有 padded_vocab_size：这应该是 ChatGLM-6B，目前尚不支持加载。",
    "The weights are stored as INT{}, which is not loaded yet.": "权重以 INT{} 格式存储，目前尚不支持加载。",
    "tokenizer.model is missing.": "缺少 tokenizer.model。",
    "tokenizer.model is a Git LFS pointer, not the file itself.": "tokenizer.model 只是 Git LFS 指针，不是文件本身。",
    "There are no weights: neither model.safetensors, pytorch_model.bin nor an index of shards.": "没有权重：找不到 model.safetensors、pytorch_model.bin，也没有分片索引。",
    "The shard {} named in {} is missing.": "缺少 {1} 中列出的分片 {0}。",
    "The shard {} named in the folder is missing.": "文件夹中缺少分片 {}。",
    "{} is a Git LFS pointer, not the file itself; run `git lfs pull` at its source.": "{} 只是 Git LFS 指针，不是文件本身；请在来源处运行 `git lfs pull`。",
    "{} cannot be loaded. {}": "无法加载 {}。{:t}",
    "Repair the folder or choose another.": "请修复该文件夹，或选择其他文件夹。",
    "Precision {} is unknown.": "未知的精度 {}。",
    "Choose one of {}.": "请从以下选项中选择：{}。",
    "Generation {} is unknown.": "未知的模型代次 {}。",
    "Choose chatglm2 or chatglm3.": "请选择 chatglm2 或 chatglm3。",
    "tokenizer.model has {} ids, the weights only {}.": "tokenizer.model 有 {} 个词元编号，权重只有 {} 个。",
    "Copy tokenizer.model and the weights from the same checkpoint.": "请从同一个检查点复制 tokenizer.model 和权重。",
    "The weights in {} cannot be read: {}: {}.": "无法读取 {} 中的权重：{}：{}。",
    "Copy the checkpoint again, or convert .bin files to safetensors.": "请重新复制检查点，或把 .bin 文件转换为 safetensors。",
    "{} lacks {} weights and has {} of another shape, such as {}.": "{} 缺少 {} 个权重，另有 {} 个形状不符，例如 {}。",
    "config.json and the weights are of different models; copy both from the same place.": "config.json 与权重属于不同的模型；请从同一来源复制两者。",
    "The model does not go onto {}: {}": "模型无法放到设备 {} 上：{}",
    "The model does not go onto {}: {} Choose the device cpu.": "模型无法放到设备 {} 上：{}。请选择设备 cpu。",
    "Choose the device cpu.": "请选择设备 cpu。",
    "There is no usable CUDA device.": "没有可用的 CUDA 设备。",
    "{} needs about {} GiB in {}; {} GiB are free on {}.": "{0} 以 {2} 精度约需 {1} GiB；{4} 上只有 {3} GiB 可用。",
    "Close other programs, choose a lower precision, or use a smaller checkpoint.": "请关闭其他程序、选择更低的精度，或使用更小的检查点。",
    "{} loaded with a wrong rotary table.": "{} 加载后的旋转位置编码表有误。",
    "Install the versions in requirements.txt.": "请安装 requirements.txt 中指定的版本。",
    "{} gives no usable numbers (its logits are not finite or all equal).": "{} 给不出可用的数值（logits 不是有限值，或全部相等）。",
    "Copy the checkpoint again; for fp16 weights try precision bf16 or fp32.": "请重新复制检查点；若权重为 fp16，请尝试 bf16 或 fp32 精度。",
    "{} cannot be read: {}: {}.": "无法读取 {}：{}：{}。",
    "Copy {} again from its source.": "请从来源处重新复制 {}。",
    "{} is missing.": "缺少 {}。",
    "{} is a Git LFS pointer, not the file itself.": "{} 只是 Git LFS 指针，不是文件本身。",
    "There is no tokenizer: neither tokenizer.json, tokenizer.model nor vocab.json.": "没有分词器：找不到 tokenizer.json、tokenizer.model 或 vocab.json。",
    "config.json says model_type {}, which is no text model that transformers has.": "config.json 中的 model_type 为 {}，transformers 没有这种文本模型。",
    "config.json says quantization_bit {}; INT8 and INT4 can be loaded.": "config.json 中的 quantization_bit 为 {}；可以加载的是 INT8 和 INT4。",
    "Choose a file of weights.": "请选择权重文件。",
    "{} holds something other than tensors ({}), so it was not opened.": "{} 中含有张量以外的内容（{}），因此没有打开。",
    "{} holds something other than tensors, so it was not opened.": "{} 中含有张量以外的内容，因此没有打开。",
    "Get the checkpoint as safetensors, or from a source you trust.": "请获取 safetensors 格式的检查点，或改用可信的来源。",
    "Copy the checkpoint again, or convert it to safetensors.": "请重新复制检查点，或将其转换为 safetensors。",
    "The prompt format {} does not fit {}.": "提示词格式 {} 不适用于 {}。",
    "Leave the prompt format to the folder.": "请不要指定提示词格式，由文件夹决定。",
    "{} is itself an adapter.": "{} 本身就是适配器。",
    "Choose a whole checkpoint as the base.": "请选择完整的检查点作为基座。",
    "{} holds an adapter alone{}.": "{} 中只有适配器{:t}。",
    "Choose its base checkpoint.": "请选择它的基座。",
    "The tokenizer has {} ids, the weights only {}.": "分词器有 {} 个词元编号，权重只有 {} 个。",
    "Copy the tokenizer and the weights from the same checkpoint.": "请从同一个检查点复制分词器和权重。",
    "{} lacks {} weights, such as {}.": "{} 缺少 {} 个权重，例如 {}。",
    "{} has {} weights of another shape than config.json says.": "{} 有 {} 个权重的形状与 config.json 不符。",
    "{} has the shape {}, config.json says {}.": "{} 的形状为 {}，而 config.json 要求 {}。",
    "{} is a LoRA adapter.": "{} 是 LoRA 适配器。",
    "Merge it into its base first.": "请先将它合并到基座中。",
    "{} cannot be written as `glm`: transformers has no class for it.": "{} 无法写成 `glm` 格式：transformers 中没有对应的类。",
    "Convert ChatGLM2, ChatGLM3 or GLM-4.": "请转换 ChatGLM2、ChatGLM3 或 GLM-4。",
    "INT8/INT4 weights cannot be written as `glm`.": "INT8/INT4 权重无法写成 `glm` 格式。",
    "Start from bf16 or fp16 weights.": "请从 bf16 或 fp16 权重开始。",
    "{} is no LoRA adapter.": "{} 不是 LoRA 适配器。",
    "A P-tuning v2 prefix is kept beside its base; use export.": "P-tuning v2 前缀与基座分开保存；请使用 export。",
    "LoRA cannot be merged into INT8/INT4 weights.": "LoRA 无法合并到 INT8/INT4 权重中。",
    "Choose a base with bf16 or fp16 weights.": "请选择权重为 bf16 或 fp16 的基座。",
    "{} cannot be read. {}": "无法读取 {}。{:t}",
    "{} has no P-tuning v2 prefix.": "{} 中没有 P-tuning v2 前缀。",
    "Choose a folder made by P-tuning v2.": "请选择由 P-tuning v2 生成的文件夹。",
    "{} exists already.": "{} 已经存在。",
    "Choose a new folder.": "请选择新的文件夹。",
    "{} cannot be written: {}.": "{} 无法写入：{:t}。",
    "Choose a folder with enough room.": "请选择空间足够的文件夹。",
    "Choose another folder.": "请选择其他文件夹。",
    # --- weights, and what a folder holds
    "{} has {} bytes, more than the {} of its header; copy it again.": "{} 有 {} 字节，多于文件头声明的 {} 字节；请重新复制。",
    "{} is no file of weights: it begins with {}.": "{} 不是权重文件：它以 {} 开头。",
    "{} has no weight_map that gives every tensor its file.": "{} 中没有为每个张量指明文件的 weight_map。",
    "{} names {}, which is no file of this folder.": "{} 列出了 {}，它不是此文件夹中的文件。",
    "{} and {} both hold {}.": "{0} 和 {1} 中都有 {2}。",
    "{} holds no table of tensors, it holds a {}.": "{} 中没有张量表，而是一个 {}。",
    "{} holds no table of tensors: its {} is a {}.": "{} 中不是纯张量表：其中的 {} 是 {}。",
    "Save the model's state_dict alone, or choose another file of weights.": "请只保存模型的 state_dict，或选择其他权重文件。",
    "{} leads to no folder.": "{} 没有指向任何文件夹。",
    "config.json names no model_type.": "config.json 中没有 model_type。",
    "config.json says {} {}, where a positive number belongs.": "config.json 中的 {} 为 {}，这里应为正数。",
    "adapter_config.json says {} {}, where a positive number belongs.": "adapter_config.json 中的 {} 为 {}，这里应为正数。",
    "Copy adapter_config.json again from its source.": "请从来源处重新复制 adapter_config.json。",
    "config.json says pre_seq_len {}, the weights hold no prefix.": "config.json 中的 pre_seq_len 为 {}，但权重中没有前缀。",
    "The weights have no {}, but {}: they are of another model than config.json.": "权重中没有 {}，却有 {}：它们与 config.json 不属于同一模型。",
    "config.json says {} layers, the weights have {}.": "config.json 中为 {} 层，权重中有 {} 层。",
    "{} is stored as {}, where floats belong.": "{} 以 {} 存储，这里应为浮点数。",
    "{} is stored as {}, but config.json has no quantization_bit.": "{} 以 {} 存储，但 config.json 中没有 quantization_bit。",
    "{} has {} columns, as in INT{}; config.json says quantization_bit {}.": "{} 有 {} 列，与 INT{} 相符；而 config.json 中的 quantization_bit 为 {}。",
    "{} has no {}_scale, without which its codes mean nothing.": "{} 缺少 {}_scale，没有它，编码就没有意义。",
    "{} has the shape {}, its layer has {} rows.": "{} 的形状为 {}，而该层有 {} 行。",
    "tokenizer_config.json asks for {}, a class in the folder's own code, which is never run.": "tokenizer_config.json 要求使用 {}，这是文件夹自带代码中的类，而这些代码从不运行。",
    "{} needs {} GiB; {} GiB are free there.": "{} 需要 {} GiB；该处只有 {} GiB 可用。",
    "{} is cut off: it is empty; copy it again.": "{} 不完整：文件为空；请重新复制。",
    "{} is cut off: it has {} bytes, its header promises {}; copy it again.": "{} 不完整：实际为 {} 字节，文件头声明为 {} 字节；请重新复制。",
    "{} is cut off: it has {} bytes and no end; copy it again.": "{} 不完整：有 {} 字节，但没有结尾；请重新复制。",
    "{} is cut off: its header cannot be read ({}).": "{} 不完整：无法读取文件头（{}）。",
    "{} cannot be read: it is a tar archive as the first versions of torch wrote them.": "无法读取 {}：它是最早版本的 torch 所用的 tar 归档。",
    # --- devices and native models
    "num_gpus is {} and the device {}.": "num_gpus 为 {}，而设备为 {}。",
    "Choose 1 or more GPUs with the device auto or cuda, or name the devices: cuda:0,cuda:1.": "请在设备为 auto 或 cuda 时选择至少 1 块 GPU，或直接写明设备：cuda:0,cuda:1。",
    "The device {} is unknown.": "未知的设备 {}。",
    "Choose auto, cpu, cuda, cuda:1 or mps, or several: cuda:0,cuda:1.": "请选择 auto、cpu、cuda、cuda:1 或 mps，也可写多个：cuda:0,cuda:1。",
    "There is no device {}; this machine has {}.": "没有设备 {}；本机有 {}。",
    "Choose cpu.": "请选择 cpu。",
    "{} has no list of {} layers that could be spread over several devices.": "{} 中没有可分布到多个设备上的 {} 层列表。",
    "Choose one device.": "请选择单个设备。",
    "The device map has no place for {}.": "设备映射没有给 {} 指定位置。",
    'Name every part of the model, or add "" for the rest.': '请写明模型的每个部分，或用 "" 表示其余部分。',
    "The device map has the embedding on {} and the head on {}.": "设备映射把词嵌入放在 {}，把输出层放在 {}。",
    "Give both the same device.": "请为两者指定同一设备。",
    "The layers of {} cannot be spread over {}: one of them has too little memory.": "{} 的各层无法分布到 {}：其中一个设备内存不足。",
    "Close other programs, choose a lower precision, or name other devices.": "请关闭其他程序、选择更低的精度或改用其他设备。",
    "{} is stored quantized by {}, which is not read here.": "{} 以 {} 量化格式存储，此处无法读取。",
    "Choose its edition with float weights; INT8 and INT4 are made from it while it is loaded.": "请选择浮点权重版本；INT8 和 INT4 会在加载时生成。",
    "{} has layers other than attention ({}), which the engine cannot run.": "{} 含有注意力以外的层（{}），引擎无法运行。",
    "Choose a model with attention in every layer.": "请选择每层都是注意力的模型。",
    "{} ({}) does not compute padded rows as it computes them alone: {}.": "{}（{}）对填充后的行与单独的行计算结果不同：{:t}。",
    "its logits differ by {} of their spread": "logits 相差达其离散程度的 {}",
    "Choose a model of another architecture, with rotary positions for example.": "请选择其他架构的模型，例如使用旋转位置编码的模型。",
    "{} takes {} tokens here instead of {}: beyond that some of its layers see a window of the text only.": "{} 在此最多容纳 {} 词元而不是 {}：超过后部分层只能看到文本的一个窗口。",
    "INT{} holds {} of the weights of {}; the rest is no linear layer or the embedding, and takes two bytes each.": "INT{0} 只覆盖 {2} 权重的 {1}；其余不是线性层或属于词嵌入，每个占两个字节。",
    # --- adapters
    "A prefix of {} columns holds nothing.": "{} 列的前缀没有任何内容。",
    "Choose a length of at least 1.": "请选择不小于 1 的长度。",
    "There is no prefix among these tensors.": "这些张量中没有前缀。",
    "A P-tuning v2 checkpoint has {}embedding.weight.": "P-tuning v2 检查点应含有 {}embedding.weight。",
    "config.json says {}={}, the prefix tensors are for {}={}.": "config.json 中为 {}={}，而前缀的张量对应 {}={}。",
    "Copy config.json and the weights from the same training run.": "请从同一次训练的结果中复制 config.json 和权重。",
    "The prefix was trained on {}; {} is {}.": "前缀的训练基座为 {:t}；而 {} 为 {:t}。",
    "Load the base it was trained on.": "请加载训练时所用的基座。",
    "Load the base it was trained on{}.": "请加载训练时所用的基座{:t}。",
    "{}{} is {}; {}, {}, needs {}. One column of this prefix holds {} numbers, one of the base {}.": "{0}{1} 实际为：{2:t}；而 {3} 为 {4:t}，需要：{5:t}。此前缀每列有 {6} 个数，基座每列有 {7} 个数。",
    "Load the base the prefix was trained on.": "请加载训练该前缀时所用的基座。",
    "{}: {}": "{}：{:t}",
    "adapter_config.json has peft_type {}.": "adapter_config.json 中的 peft_type 为 {}。",
    "Only LORA is loaded; a prefix has to be in the released format, with pre_seq_len in config.json.": "只能加载 LORA；前缀必须采用官方发布的格式，并在 config.json 中给出 pre_seq_len。",
    "adapter_config.json has {}={}, which changes more than the low-rank product.": "adapter_config.json 中有 {}={}，它改变的不只是低秩乘积。",
    "Merge this adapter with the program that trained it, and load the merged checkpoint.": "请用训练该适配器的程序将其合并，再加载合并后的检查点。",
    "{} has no weights.": "{} 中没有权重。",
    "Copy {} into it.": "请把 {:t} 复制到其中。",
    "{} has rank {} for {}, adapter_config.json says r={}.": "{0} 中 {2} 的秩为 {1}，而 adapter_config.json 中 r={3}。",
    "Copy both files from the same training run; the strength of the adapter depends on r.": "请从同一次训练的结果中复制这两个文件；适配器的强度取决于 r。",
    "Every B of this adapter is zero: it changes no answer. It was saved before training.": "此适配器的所有 B 矩阵均为零，不会改变任何回答。它是在训练之前保存的。",
    "{} has no linear layer named {}.": "{} 中没有这样的线性层：{:t}。",
    "Choose from {}.": "请从以下名称中选择：{}。",
    "No adapter named {} is loaded.": "没有加载名为 {} 的适配器。",
    "Loaded are {}; load it first.": "已加载的有：{}；请先加载它。",
    "Save under the name it was loaded with.": "请用加载时的名称保存。",
    "An adapter named {} is already loaded.": "已加载名为 {} 的适配器。",
    "Unload it, or choose another name.": "请将它卸载，或选择其他名称。",
    "The adapter sits on {}, whose weights are quantized; the sum would be rounded away.": "适配器位于 {} 上，该层的权重已量化；相加的结果会在舍入中丢失。",
    "Keep the adapter beside the model, or load the base in bf16 or fp32 and merge there.": "请让适配器与模型分开保存，或以 bf16 或 fp32 加载基座后再合并。",
    "The adapter sits on {}, which shares its weights with the input embedding.": "适配器位于 {} 上，该层与输入词嵌入共用权重。",
    "Keep the adapter beside the model: merging would change the embedding as well.": "请让适配器与模型分开保存：合并会同时改变词嵌入。",
    "No LoRA is loaded into this model.": "此模型没有加载 LoRA。",
    "Load one first.": "请先加载一个。",
    "{} has {}, which is no A or B of a linear layer.": "{} 中的 {} 不是线性层的 A 或 B 矩阵。",
    "{} lacks half of the adapter of {}, or its halves are of different ranks.": "{} 缺少 {} 的适配器的一半，或两半的秩不同。",
    "{} holds no LoRA tensors.": "{} 中没有 LoRA 张量。",
    "Copy the adapter again from its source.": "请从来源处重新复制适配器。",
    "The adapter in {} adapts {}, which {} with {} layers does not have.": "{} 中的适配器作用于 {}，而 {}（{} 层）中没有它。",
    "The adapter in {} is for a {} of {} -> {}; in this base it is {} -> {}.": "{} 中的适配器要求 {} 为 {} -> {}；而此基座中为 {} -> {}。",
    "It was trained on another base; load it onto that one.": "它是在另一个基座上训练的；请加载到那个基座上。",
    "The adapter changes {} of the {} layers named {}.": "在名为 {2} 的 {1} 层中，适配器只改变了 {0} 层。",
    "The adapter adapts {}; {} {}.": "适配器作用于{:t}；而 {} {:t}。",
    "There is no {}.": "没有 {:t}。",
    "Choose the folder that holds {}.": "请选择包含 {} 的文件夹。",
    "Copy it again from its source.": "请从来源处重新复制。",
    "config.json in {} describes no model: {}: {}.": "{} 中的 config.json 没有描述任何模型：{}：{}。",
    "config.json in {} describes {} weights, the files hold {}.": "{} 中的 config.json 描述了 {} 个权重，而文件里有 {} 个。",
    "Copy it again from its source; a file of about 130 bytes is a Git LFS pointer, not the file itself.": "请从来源处重新复制；约 130 字节的文件只是 Git LFS 指针，不是文件本身。",
    "The adapter changed none of {} test answers: it may be untrained, or for another base.": "适配器没有改变 {} 个测试回答中的任何一个：它可能未经训练，或属于另一个基座。",
    "{} carries no adapter that could be switched off.": "{} 没有可以关闭的适配器。",
    "Load a P-tuning v2 or LoRA folder.": "请加载 P-tuning v2 或 LoRA 文件夹。",
    # --- quantization
    "Weights cannot be stored with {} bits.": "权重无法以 {} 位存储。",
    "Choose 8 or 4.": "请选择 8 或 4。",
    "{} columns cannot be stored in pairs.": "{} 列无法成对存储。",
    "Choose INT8 for this model.": "此模型请选择 INT8。",
    "Codes from {} to {} do not fit into 4 bits.": "{} 到 {} 的编码超出了 4 位的范围。",
    "Quantize the weight with bits=4.": "请以 bits=4 量化该权重。",
    "The weight has values up to {}, which fp16 cannot hold.": "权重中的数值最大达 {}，fp16 无法表示。",
    "Quantize a checkpoint with finite weights below 65,504.": "请量化权重均为有限值且小于 65,504 的检查点。",
    "Codes of the shape {} have scales of the shape {}.": "编码的形状为 {}，缩放系数的形状却为 {}。",
    "weight and weight_scale are of different layers; copy both from the same checkpoint.": "weight 与 weight_scale 属于不同的层；请从同一个检查点复制两者。",
    "{} carries an adapter, whose own layers are not to be rounded.": "{} 带有适配器，适配器自身的层不应被舍入。",
    "Quantize the base first and load the adapter onto it.": "请先量化基座，再把适配器加载到基座上。",
    "{} has no linear layers with float weights.": "{} 中没有浮点权重的线性层。",
    "Quantize a model that is loaded in fp32, bf16 or fp16, without an adapter.": "请量化以 fp32、bf16 或 fp16 加载且不带适配器的模型。",
    "{} has {} columns, which cannot be stored in pairs.": "{} 有 {} 列，无法成对存储。",
    "{} has a head of its own beside its embedding.": "{} 的输出层独立于词嵌入。",
    "Only ChatGLM-6B was released with quantized embeddings; set quantization_embeddings to false.": "只有 ChatGLM-6B 发布过量化的词嵌入；请把 quantization_embeddings 设为 false。",
    # --- models and tokenizers
    "config.json has {}={}, which no published ChatGLM2/3 checkpoint has.": "config.json 中有 {}={}，已发布的 ChatGLM2/3 检查点都没有这种设置。",
    "Load a checkpoint with {}={}.": "请加载 {}={} 的检查点。",
    "{} is not a readable sentencepiece file ({}).": "{} 不是可读取的 sentencepiece 文件（{}）。",
    "Copy tokenizer.model again from the place the checkpoint came from.": "请从检查点的来源处重新复制 tokenizer.model。",
    "ChatGLM2-6B knows no system prompt.": "ChatGLM2-6B 不支持系统提示词。",
    "Leave it empty, or put the instruction into the first question.": "请留空，或把指令写进第一个问题。",
    "config.json has no {}.": "config.json 中没有 {}。",
    "Copy config.json from a ChatGLM-6B checkpoint.": "请从 ChatGLM-6B 检查点复制 config.json。",
    "Copy config.json again from the checkpoint's source.": "请从检查点的来源处重新复制 config.json。",
    "config.json has {}={}, which no published ChatGLM-6B checkpoint has.": "config.json 中有 {}={}，已发布的 ChatGLM-6B 检查点都没有这种设置。",
    "Load a checkpoint where {} is {}.": "请加载 {} 为{:t}的检查点。",
    "Row {} of the ids holds no {}.": "词元编号的第 {} 行中没有 {:t}。",
    "Row {} of the ids holds no <sop> ({}).": "词元编号的第 {} 行中没有 <sop>（{}）。",
    "End every prompt with [gMASK] <sop>, as the tokenizer does.": "请像分词器那样，让每个提示词以 [gMASK] <sop> 结尾。",
    "ChatGLM-6B takes no position_ids: its positions have two rows.": "ChatGLM-6B 不接受 position_ids：它的位置编号有两行。",
    "Pass glm_position_ids of shape (batch, 2, n), or none.": "请传入形状为 (batch, 2, n) 的 glm_position_ids，或不传。",
    "Both or none of input_ids and inputs_embeds are given.": "input_ids 和 inputs_embeds 同时给出，或都没有给出。",
    "Pass one of them.": "请传入其中一个。",
    "Gradient checkpointing computes every layer twice, which would write the cache twice.": "梯度检查点会把每一层计算两次，从而重复写入缓存。",
    "Switch it off, or pass a prefix as an object whose update() keeps nothing.": "请将其关闭，或以 update() 不保留任何内容的对象传入前缀。",
    "The attention mask is {}-D {}, with glm_position_ids.": "注意力掩码为 {} 维 {}，并带有 glm_position_ids。",
    "The attention mask is {}-D {}, without glm_position_ids.": "注意力掩码为 {} 维 {}，没有带 glm_position_ids。",
    "Pass one of shape (batch, columns), or (batch, 1, n, columns) of bool and glm_position_ids with it.": "请传入形状为 (batch, columns) 的掩码，或形状为 (batch, 1, n, columns) 的布尔掩码并同时传入 glm_position_ids。",
    "The attention mask has {} columns, for {} cached and {} new ones.": "注意力掩码有 {} 列，而缓存有 {} 列，新增 {} 列。",
    "Give it one column for every token of the row, cached ones included.": "请让该行的每个词元（包括已缓存的）都对应一列。",
    "inputs_embeds say nothing of <sop>.": "从 inputs_embeds 无法得知 <sop> 的位置。",
    "Pass glm_position_ids of shape (batch, 2, n) too.": "请同时传入形状为 (batch, 2, n) 的 glm_position_ids。",
    "The cache holds {} columns and the prefix has {}: these ids go on with a row whose beginning is not known.": "缓存有 {} 列，前缀有 {} 列：这些词元编号接在开头未知的行之后。",
    "Pass glm_position_ids of shape (batch, 2, n), or prefix_length if the cache holds only that.": "请传入形状为 (batch, 2, n) 的 glm_position_ids；若缓存中只有前缀，则传入 prefix_length。",
    "A part of the prompt comes on top of {} cached columns; a prompt of ChatGLM-6B attends to itself in both directions and cannot be computed in pieces.": "提示词的一部分接在 {} 列缓存之后；ChatGLM-6B 的提示词内部是双向注意力，不能分段计算。",
    "Feed the prompt up to <sop> at once, or pass prefix_length if the cache holds only that.": "请一次性输入直到 <sop> 的提示词；若缓存中只有前缀，则传入 prefix_length。",
    "The cache holds {} columns, the prefix has {} and the rows {} ids.": "缓存有 {} 列，前缀有 {} 列，各行有 {} 个词元编号。",
    "Pass whole rows, cached tokens included, and prefix_length for a P-tuning prefix in the cache.": "请传入完整的行（包括已缓存的词元）；若缓存中有 P-tuning 前缀，请同时传入 prefix_length。",
    "prefill_chunk_size is set; a prompt of ChatGLM-6B attends to itself in both directions and cannot be computed in pieces.": "设置了 prefill_chunk_size；而 ChatGLM-6B 的提示词内部是双向注意力，不能分段计算。",
    "Leave prefill_chunk_size out.": "请去掉 prefill_chunk_size。",
    "generate() makes the positions of every step itself.": "generate() 会自行生成每一步的位置编号。",
    "Leave them out; mark padding in a 2-D attention_mask.": "请不要传入；填充位置请用二维的 attention_mask 标记。",
    "transformers' continuous batching knows only causal prompts, ChatGLM-6B's are bidirectional.": "transformers 的连续批处理只支持因果（单向）提示词，而 ChatGLM-6B 的提示词是双向的。",
    "Use generate() with left-padded rows, or glm_core.engine.": "请对左侧填充的行使用 generate()，或使用 glm_core.engine。",
    "A training example has no answer.": "有一个训练样本没有回答。",
    "A training example has no prompt.": "有一个训练样本没有提示词。",
    "Leave such rows out, or choose other columns.": "请去掉这样的行，或选择其他列。",
    "A prompt of {} tokens leaves no room for a question.": "{} 词元的提示词没有给问题留下空间。",
    "Raise the longest prompt.": "请调大提示词的最大长度。",
    "{} is not the vocabulary of ChatGLM-6B: it has no piece for line breaks or for [gMASK].": "{} 不是 ChatGLM-6B 的词表：其中没有表示换行或 [gMASK] 的词元。",
    "Copy ice_text.model again from the place the checkpoint came from.": "请从检查点的来源处重新复制 ice_text.model。",
    "ChatGLM-6B knows no system prompt.": "ChatGLM-6B 不支持系统提示词。",
    "The call of {} that the model wrote cannot be read ({}).": "无法读取模型写出的对 {} 的调用（{:t}）。",
    "Ask again, or describe the tool's parameters more plainly.": "请重新提问，或把工具的参数描述得更清楚。",
    "{} is not a readable file of token ranks ({}).": "{} 不是可读取的词元排名文件（{:t}）。",
    "A tool of type {} cannot be announced.": "无法向模型声明类型为 {} 的工具。",
    "Describe it as a function with a name and parameters.": "请将其描述为带有名称和参数的函数。",
    "The prompt format {} is unknown.": "未知的提示词格式 {}。",
    "The tokenizer in {} cannot be read: {}: {}.": "无法读取 {} 中的分词器：{}：{}。",
    "Copy the tokenizer's files again from the place the checkpoint came from.": "请从检查点的来源处重新复制分词器的文件。",
    "The model's chat template refuses this conversation: {}.": "模型的对话模板拒绝了此对话：{}。",
    "Leave the system prompt empty, or put the instruction into the first question.": "请将系统提示词留空，或把指令写进第一个问题。",
    # --- engine
    "{} is {}.": "{} 为 {}，超出范围。",
    "Choose a value from {} to {}.": "请选择 {} 到 {} 之间的值。",
    "A stop text is empty.": "有一个停止文本是空的。",
    "Remove it.": "请删除它。",
    "{} requests are waiting, which is as many as the queue takes.": "已有 {} 个请求在等待，队列已满。",
    "Try again in a moment.": "请稍后再试。",
    "{} of {} rows generated together equal the rows generated alone ({}).": "{1} 行中有 {0} 行批量生成的结果与逐条生成的一致（{2}）。",
    "Generation failed: {}: {}.": "生成失败：{}：{}。",
    "Try again; see the log.": "请重试；详情见日志。",
    "Memory ran out: now {} rows at a time.": "内存不足：现在每次处理 {} 行。",
    "started again in a smaller batch, memory had run out": "因内存不足，已改用更小的批次重新开始",
    "Memory ran out on a prompt of {} tokens.": "处理 {} 词元的提示词时内存不足。",
    "Shorten the text or the history, close other programs, or load the model in a lower precision.": "请缩短文本或历史对话、关闭其他程序，或以更低的精度加载模型。",
    "The model was unloaded.": "模型已被卸载。",
    "Load it again.": "请重新加载。",
    "Load it again on the Models page.": "请在“模型”页重新加载。",
    "The prompt is empty.": "提示词为空。",
    "Enter a text.": "请输入文本。",
    "The prompt has {} tokens, the model takes {} with the answer.": "提示词有 {} 词元，模型连同回答最多容纳 {} 词元。",
    "Shorten the text or the history.": "请缩短文本或历史对话。",
    "{} did not load: {}: {}.": "{} 未能加载：{}：{}。",
    "See the log for details.": "详情见日志。",
    "The loaded model is in use by {}.": "已加载的模型正在被{:t}使用。",
    "Pause it on the Jobs page first.": "请先在“任务”页暂停它。",
    "The model's numbers left the range of {} after {} tokens.": "生成 {1} 个词元后，模型的数值超出了 {0} 的范围。",
    "Load the model in bf16 or fp32, or shorten the text.": "请以 bf16 或 fp32 加载模型，或缩短文本。",
    # --- chat
    "There is no question to answer.": "没有要回答的问题。",
    "Write a question.": "请输入问题。",
    "{} {} tokens; there is room for {} ({} of context less {} kept for the answer).": "{:t} {} 词元；可用空间为 {} 词元（上下文 {} 词元，其中 {} 留给回答）。",
    "Shorten the question or the system prompt, or lower the longest answer.": "请缩短问题或系统提示词，或调小“最长回答”。",
    "The title is empty.": "标题为空。",
    "Write a title.": "请输入标题。",
    "The format {} is unknown.": "未知的格式 {}。",
    "Choose md or json.": "请选择 md 或 json。",
    "The question is empty.": "问题为空。",
    "No model is loaded.": "尚未加载模型。",
    "Load one on the Models page.": "请在“模型”页加载一个模型。",
    "The last answer is still being written.": "上一个回答尚未完成。",
    "Wait for its end, or stop it.": "请等待它结束，或先停止它。",
    "There is no question to answer again.": "没有可重新回答的问题。",
    "Ask one.": "请先提一个问题。",
    "There is no conversation {}.": "没有对话 {}。",
    "It was deleted; start a new one.": "它已被删除；请开始新的对话。",
    "The conversations in {} cannot be read or written: {}.": "{} 中的对话无法读取或写入：{:t}。",
    "Check that the disk has room and that the workspace folder may be written.": "请检查磁盘空间，以及工作区文件夹是否允许写入。",
    # --- jobs
    "The job database {} cannot be used: {}.": "任务数据库 {} 无法使用：{:t}。",
    "Free some disk space, or set GLM_WORKSPACE to another folder.": "请清理磁盘空间，或把 GLM_WORKSPACE 设为其他文件夹。",
    "The job was cancelled while its rows were read.": "读取各行时任务已被取消。",
    "Start it again.": "请重新开始。",
    "There is no job {}.": "没有任务 {}。",
    "It may have been deleted; look at the list of jobs.": "它可能已被删除；请查看任务列表。",
    "The job was deleted or is run by another process.": "任务已被删除，或正由其他进程运行。",
    "The job is {}; there is nothing to pause.": "任务处于“{:t}”状态，无法暂停。",
    "The job is {} already.": "任务已经处于“{:t}”状态。",
    "The file was not read to its end.": "文件没有读完。",
    "Start the job again from the file.": "请用该文件重新开始任务。",
    "The job is {}; there is nothing to resume.": "任务处于“{:t}”状态，无法继续。",
    "The failed rows can be tried again once the job has stopped.": "任务停止后才能重试失败的行。",
    "Pause it first.": "请先暂停任务。",
    "No row of this job failed.": "此任务没有失败的行。",
    "{} failed rows are tried again.": "正在重试失败的 {} 行。",
    "The job is {}.": "任务处于“{:t}”状态。",
    "Cancel it first, then delete it.": "请先取消，再删除。",
    "The file was not read to its end; start it again.": "文件没有读完；请重新开始。",
    "The program ended {} times while this job ran, without finishing a row. Choose a smaller model, a lower precision or a shorter context, or resume to try again.": "运行此任务时程序意外结束了 {} 次，没有完成任何一行。请选择更小的模型、更低的精度或更短的上下文，也可以继续任务再试一次。",
    "Nothing is lost: finished rows are stored, and the job goes on from there once you resume it.": "没有数据丢失：已完成的行都已保存，继续任务后会从那里接着运行。",
    "The disk is full. Free some space. {}": "磁盘已满，请清理空间。{:t}",
    "The disk with the workspace cannot be written ({}). {}": "工作区所在的磁盘无法写入（{:t}）。{:t}",
    "Another program kept the job database locked for {} seconds. {}": "其他程序锁定任务数据库超过 {} 秒。{:t}",
    "internal error: the runner ended with {} rows left.": "内部错误：运行结束时还剩 {} 行未处理。",
    "internal error: {}: {} (details in logs/{}.log of the workspace)": "内部错误：{}：{}（详情见工作区的 logs/{}.log）",
    # --- batch
    "The stored batch task is incomplete ({}).": "保存的批量任务不完整（{}）。",
    "Start the job again.": "请重新开始任务。",
    "The template has a single {} at character {}.": "模板的第 {1} 个字符处有单独的 {0}。",
    "Write {{column}} for a cell, and {{{{ or }}}} for a brace that is text.": "用 {{列名}} 表示单元格；花括号本身请写成 {{{{ 或 }}}}。",
    "The template uses {{{}}}, but there is no such column. There are: {}.": "模板中用到了 {{{}}}，但表格没有这一列。现有的列：{:t}。",
    "Use one of these, or write {{{{ and }}}} for braces that are text.": "请使用其中一列；花括号本身请写成 {{{{ 和 }}}}。",
    "The template uses no column, so every row would get the same prompt.": "模板没有用到任何列，每一行的提示词都会相同。",
    "Put at least one of these into it: {}.": "请至少加入其中一列：{:t}。",
    "The template alone has {} tokens; the model takes {}, of which {} are kept for the answer.": "仅模板就有 {} 词元；模型最多容纳 {} 词元，其中 {} 留给回答。",
    "Shorten the template or the system text, or allow fewer new tokens.": "请缩短模板或系统提示词，或减少生成的词元数。",
    "The trial was stopped.": "试跑已停止。",
    "Choose the file again.": "请重新选择文件。",
    "The output column has no name.": "输出列没有名称。",
    "Give it one, for example answer.": "请为它命名，例如 answer。",
    "{} has no rows.": "{} 没有数据行。",
    "Choose a file with at least one row of data.": "请选择至少有一行数据的文件。",
    "The checkpoint {} is not the one this job was started with; its files have changed.": "检查点 {} 已不是此任务开始时所用的那个；其文件已改变。",
    "Put the old files back and resume, or start a new job.": "请恢复原来的文件后继续，或新建任务。",
    "Part of the rows ran with other versions than at the start: {}.": "部分行运行时的软件版本与开始时不同：{}。",
    "Loading {}": "正在加载 {}",
    "A cell holds half a character. Repair the text of this row.": "有单元格含半个字符。请修复这一行的文本。",
    "Rows with the same prompt were generated once and share the answer; the copies have 0 seconds.": "提示词相同的行只生成一次并共用回答；重复行的用时为 0 秒。",
    "Some rows were {}.": "部分行：{:t}。",
    "The model was unloaded while the job ran.": "任务运行期间模型被卸载。",
    "Resume the job to load it again.": "继续任务即可重新加载。",
    "The engine gave no reason.": "引擎没有说明原因。",
    "It was cancelled.": "已取消。",
    "The answer was cut at {} tokens.": "回答在 {} 词元处被截断。",
    "{} could not be written: {}.": "{} 无法写入：{:t}。",
    "Free some disk space.": "请清理磁盘空间。",
    # --- tables: options, uploads, what a file is
    "on_bad_rows is {}.": "on_bad_rows 的值为 {}。",
    "Choose stop, skip or join.": "请选择 stop、skip 或 join。",
    "The delimiter is {}.": "分隔符为 {}。",
    "Choose a single character such as a comma, or nothing for one column.": "请选择单个字符（如逗号）；单列则留空。",
    "There is no text encoding {}.": "没有名为 {} 的文本编码。",
    "Choose one such as utf-8, gb18030, big5, utf-16 or cp1252.": "请选择 utf-8、gb18030、big5、utf-16 或 cp1252 等编码。",
    "{} without a name ({}) got one such as column_{}.": "{:t}没有名称（{}），已命名为 column_{} 等。",
    "Repeated column names were numbered: {}.": "重复的列名已编号：{}。",
    "{} is larger than the upload limit of {} MB.": "{} 超过了 {} MB 的上传上限。",
    "Open it by its path on this computer, or split it.": "请通过本机路径打开，或拆分文件。",
    "{} could not be stored: {}.": "{} 无法保存：{:t}。",
    "{} cannot be opened: {}.": "{} 无法打开：{:t}。",
    "Check that it is still there.": "请检查文件是否仍在原处。",
    "{} is empty.": "{} 是空的。",
    "the sheet {} of {} is empty.": "{1} 的工作表 {0} 是空的。",
    "Choose a file with a header row and rows.": "请选择有表头和数据行的文件。",
    "{} is {}, not a table.": "{} 是{:t}，不是表格。",
    "Export the table from where it was made as .xlsx or CSV.": "请在制作该表格的程序中导出为 .xlsx 或 CSV。",
    "Unpack it first.": "请先解压。",
    "Save it as Parquet.": "请另存为 Parquet。",
    "Export the table you need as CSV.": "请把需要的表导出为 CSV。",
    "Give a table: CSV, Excel, JSON, JSONL or Parquet.": "请提供表格：CSV、Excel、JSON、JSONL 或 Parquet。",
    "{} is a web page (HTML), whatever its name says, not a spreadsheet.": "不论文件名如何，{} 其实是网页（HTML），不是电子表格。",
    "{} is an XML file, not a spreadsheet that can be read.": "{} 是 XML 文件，不是可读取的电子表格。",
    "Open it in Excel, WPS or LibreOffice and save it as .xlsx (or as CSV UTF-8).": "请用 Excel、WPS 或 LibreOffice 打开，另存为 .xlsx（或 CSV UTF-8）。",
    "{} is a damaged Excel file or archive ({}).": "{} 是损坏的 Excel 文件或压缩包（{}）。",
    "Copy or download it again.": "请重新复制或下载。",
    "{} is a spreadsheet, but neither .xlsx nor .xls.": "{} 是电子表格，但既不是 .xlsx 也不是 .xls。",
    "{} is a ZIP archive, not a table.": "{} 是 ZIP 压缩包，不是表格。",
    "Unpack it and choose the file inside.": "请解压后选择其中的文件。",
    # --- tables: encoding and delimiter
    "{} is not text (it holds NUL bytes and is not UTF-8), so it is no table.": "{} 不是文本（含 NUL 字节且不是 UTF-8），因此不是表格。",
    "Give a table: CSV, Excel, JSON, JSONL or Parquet; or choose its encoding.": "请提供表格：CSV、Excel、JSON、JSONL 或 Parquet；或选择文件的编码。",
    "{} is in no encoding that could be recognised: it is not UTF-8 (line {}) nor GB18030.": "无法识别 {} 的编码：既不是 UTF-8（第 {} 行），也不是 GB18030。",
    "Choose its encoding, or save it as CSV UTF-8.": "请选择文件的编码，或另存为 CSV UTF-8。",
    "Characters that cannot be read are shown as \ufffd.": "无法读取的字符显示为 \ufffd。",
    "The encoding was guessed as {}; if characters look wrong, choose another one.": "编码是猜测的（{}）；如果字符显示不正确，请选择其他编码。",
    "{} cannot be read as {}: a character on line {} is damaged.": "{0} 无法按 {1} 读取：第 {2} 行有损坏的字符。",
    'Repair that line, choose another encoding, or choose "{}:replace" to show \ufffd there.': "请修复该行、选择其他编码，或选择“{}:replace”以 \ufffd 代替损坏的字符。",
    "Read as one column: {} do not give the same number of cells in each line.": "按单列读取：以{:t}分隔时，各行的单元格数不一致。",
    "Spaces after a delimiter were taken as part of it, because quoted cells follow them.": "分隔符后的空格已视为分隔符的一部分，因为其后是带引号的单元格。",
    "Quotation marks were read as ordinary characters, because they do not enclose cells.": "引号已按普通字符读取，因为它们并未包住单元格。",
    "The file has {} (code 0), kept in the cells.": "文件中有{:t}（编码 0），已保留在单元格中。",
    "There are no rows below the header.": "表头之下没有数据行。",
    # --- tables: rows of text files
    "{} has {} that does not fit the {} of the header: {}{}.": "{} 有{:t}与表头的{:t}不符：{:t}{:t}。",
    "{} has {} that do not fit the {} of the header: {}{}.": "{} 有{:t}与表头的{:t}不符：{:t}{:t}。",
    "Correct them in the spreadsheet, choose another delimiter, or choose to skip such rows or to join the surplus cells.": "请在表格软件中更正、选择其他分隔符，或选择跳过这些行、合并多余的单元格。",
    "{} has a cell of more than {} characters on line {}; most likely a quotation mark is never closed.": "{0} 的第 {2} 行有超过 {1} 个字符的单元格；很可能是引号没有闭合。",
    "{} ends inside a quoted cell: the quotation mark opened on line {} is never closed (…{}).": "{} 在带引号的单元格中结束：第 {} 行的引号没有闭合（…{}）。",
    "{} cannot be read at line {}: {}.": "无法读取 {} 的第 {} 行：{}。",
    'Close the quotation mark on that line, or write it twice ("") in the text.': '请在该行补上闭合的引号，或在文本中把引号写成两个（""）。',
    "{} with fewer cells than the header got empty cells at the end (line {}).": "{:t}的单元格少于表头，末尾已补空单元格（第 {:t} 行）。",
    "Left out: {} with too many cells or faulty quotes (line {}).": "已跳过：{:t}的单元格过多或引号有误（第 {:t} 行）。",
    "Joined into the last column: the surplus cells of {} (line {}).": "已并入最后一列：{:t}的多余单元格（第 {:t} 行）。",
    "{} with faulty quotes read as well as possible (line {}).": "{:t}的引号有误，已尽可能读取（第 {:t} 行）。",
    # --- tables: JSON and Parquet
    "Left out: {} not valid as JSON (line {}).": "已跳过：{:t}不是有效的 JSON（第 {:t} 行）。",
    "{} is not valid JSON at line {}, column {}: {} (after …{} comes {}).": "{} 在第 {} 行第 {} 列处不是有效的 JSON：{:t}（在 …{} 之后是 {}）。",
    "{} is not valid JSON at line {}, column {}: {} (after …{} comes the end).": "{} 在第 {} 行第 {} 列处不是有效的 JSON：{:t}（在 …{} 之后文件就结束了）。",
    "Correct that place; a comma or quotation mark before it is the usual cause.": "请更正该处；通常是它前面的逗号或引号有误。",
    "{} is nested too deeply for a table.": "{} 嵌套过深，无法作为表格。",
    "Flatten it first.": "请先展平。",
    "{} {} of it are not valid JSON (line {}).": "{:t}其中{:t}不是有效的 JSON（第 {:t} 行）。",
    "Correct them, or choose to skip such rows.": "请更正，或选择跳过这些行。",
    "{} Or choose to skip such rows.": "{:t}或选择跳过这些行。",
    "{} is empty: it has no records.": "{} 是空的：没有记录。",
    "Choose a file with records.": "请选择有记录的文件。",
    "{} is one JSON document of {} GB; more than 1 GB does not fit.": "{} 是 {} GB 的单个 JSON 文档；超过 1 GB 无法读取。",
    "Save it as JSONL (one object per line), which is read line by line.": "请另存为 JSONL（每行一个对象），可逐行读取。",
    "{} {}.": "{} {:t}。",
    "Give the key of the records, or reshape it.": "请指定记录所在的键，或调整文件结构。",
    "{} has records, but none has a field.": "{} 有记录，但都没有字段。",
    "Choose another file.": "请选择其他文件。",
    "Only the records under {} were read.": "只读取了 {} 下的记录。",
    "{} is empty: it has no columns.": "{} 是空的：没有列。",
    "{} cannot be read as Parquet ({}).": "{} 无法作为 Parquet 读取（{}）。",
    "Write it again, or give it as CSV.": "请重新生成，或提供 CSV。",
    # --- tables: workbooks
    "The sheet {} is hidden in Excel.": "工作表 {} 在 Excel 中是隐藏的。",
    "{} of the workbook with an Excel error such as #DIV/0! or #N/A is read as empty.": "工作簿中{:t}含 Excel 错误值（如 #DIV/0! 或 #N/A），已按空值读取。",
    "{} of the workbook with an Excel error such as #DIV/0! or #N/A are read as empty.": "工作簿中{:t}含 Excel 错误值（如 #DIV/0! 或 #N/A），已按空值读取。",
    "{} kept, so that rows line up with the sheet.": "保留了{:t}，使行号与工作表一致。",
    "{} of more than 15 digits: Excel has rounded them; store ids as text.": "有{:t}超过 15 位：Excel 已将其舍入；编号请存为文本。",
    "{} has no sheet {}; it has {}.": "{} 中没有工作表 {}；现有：{}。",
    "Choose one of these sheets.": "请从中选择工作表。",
    "Choose a sheet with a header row and rows.": "请选择有表头和数据行的工作表。",
    "{} is protected with a password.": "{} 受密码保护。",
    "Open it in Excel, remove the password (File > Info > Protect Workbook) and save it again.": "请在 Excel 中打开，移除密码（文件 > 信息 > 保护工作簿）后重新保存。",
    "{} cannot be read as an Excel workbook ({}).": "{} 无法作为 Excel 工作簿读取（{}）。",
    "{} has a sheet of {} rows by {} columns, mostly empty.": "{} 有一个 {} 行 × {} 列的工作表，大部分是空的。",
    "Delete the stray cells far right or far down (Ctrl+End finds them), or save as CSV.": "请删除远在右侧或下方的零散单元格（按 Ctrl+End 可找到），或另存为 CSV。",
    "{} unpacks to more than {} MB from {} MB, which is beyond what is safe to open.": "{0} 只有 {2} MB，解压后却超过 {1} MB，打开不安全。",
    "Save the sheet you need as CSV.": "请把需要的工作表另存为 CSV。",
    # --- tables: writing
    "{} that Excel would take for a formula got a leading apostrophe.": "{:t}会被 Excel 当作公式，前面已加撇号。",
    "{} held half a character (a lone surrogate or noncharacter), shown as \ufffd.": "{:t}含半个字符（孤立代理项或非字符），显示为 \ufffd。",
    "{} held control characters, escaped the way Excel does it (_x0000_).": "{:t}含控制字符，已按 Excel 的方式转义（_x0000_）。",
    "{} longer than the 32,767 characters Excel holds were cut; JSONL and Parquet hold the full text.": "{:t}超过 Excel 的 32,767 个字符上限，已截断；JSONL 和 Parquet 保留全文。",
    "{} with numbers of more than 15 digits were written as text, as Excel would round them.": "{:t}含超过 15 位的数字，已写为文本，以免被 Excel 舍入。",
    "{} with NaN or infinity were written as null, which is all JSON has.": "{:t}为 NaN 或无穷大，已写为 null（JSON 没有其他表示）。",
    "Tables cannot be written as {}.": "表格无法写成 {} 格式。",
    "{} would have no columns.": "{} 将没有任何列。",
    "Choose at least one column.": "请至少选择一列。",
    "{} would have two columns of one name.": "{} 将有两列同名。",
    "Rename one of them.": "请重命名其中一列。",
    "Free some disk space or choose another folder.": "请清理磁盘空间，或选择其他文件夹。",
    "Row {} has {} for {}.": "第 {} 行有{:t}，而表格有{:t}。",
    "{} columns are more than the {} of an Excel sheet.": "{} 列超过了 Excel 工作表的上限（{} 列）。",
    "Write CSV or Parquet instead.": "请改用 CSV 或 Parquet。",
    "The table has more than the {} rows an Excel sheet can hold.": "表格超过了 Excel 工作表的上限（{} 行）。",
    # --- finetune: examples
    "There is no layout {}.": "没有布局 {}。",
    "Choose context-target or text.": "请选择 context-target 或 text。",
    "{} has no columns instruction and output; it has {}.": "{} 没有 instruction 和 output 列；现有列：{}。",
    "Choose an Alpaca file: instruction, output and, where there is one, input.": "请选择 Alpaca 格式的文件：instruction、output，以及可选的 input。",
    "{} has only the column {}, in which question and answer stand together.": "{} 只有 {} 一列，问题和回答写在一起。",
    "Give the file it was made from (instruction, input, output); it is read as it is, and glm_core.finetune.examples.convert_alpaca writes it as context and target.": "请提供生成它的原始文件（instruction、input、output），可直接读取；glm_core.finetune.examples.convert_alpaca 可将其写成 context 和 target。",
    "The columns of {} do not say which is the prompt and which the response; it has {}.": "从 {} 的列名看不出哪一列是提问、哪一列是回答；现有列：{}。",
    "Choose both columns.": "请选择这两列。",
    "{} has no column {}; it has {}.": "{} 没有 {} 列；现有列：{}。",
    "Choose one of these columns, or rename the column in the file.": "请选择其中一列，或在文件中修改列名。",
    "{} has {}; the first {} are used.": "{} 有{:t}；只使用前 {} 行。",
    "Raise the limit to use all.": "要全部使用，请提高上限。",
    "Left out: {} without a prompt ({}).": "已跳过：{:t}没有提问（{:t}）。",
    "Left out: {} without a response ({}).": "已跳过：{:t}没有回答（{:t}）。",
    "The history cannot be read in {} ({}).": "{:t}的历史对话无法读取（{:t}）。",
    'Write it as a list of pairs: [["question", "answer"], ...].': '请写成问答对的列表：[["问题", "回答"], ...]。',
    "The conversation cannot be read in {} ({}).": "{:t}的对话无法读取（{:t}）。",
    'Write it as messages that take turns: [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}].': '请写成轮流发言的消息：[{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]。',
    "The last question has no answer in {} ({}); it is left out.": "{:t}的最后一个问题没有回答（{:t}），已略去。",
    "The system message was put before the first question in {} ({}).": "{:t}的系统消息已放到第一个问题之前（{:t}）。",
    "Half a character was read as \ufffd in {} ({}).": "{:t}含半个字符，已读作 \ufffd（{:t}）。",
    "{} has no rows below its header.": "{} 的表头之下没有数据行。",
    "Choose a file with rows.": "请选择有数据行的文件。",
    "{} has {}, but none with a prompt and a response.": "{} 有{:t}，但没有一行同时有提问和回答。",
    "Choose other columns, or fill them in.": "请选择其他列，或补全内容。",
    "All {} responses are {}: with one class there is nothing to learn.": "全部 {} 个回答都是 {}：只有一个类别，没有可学的内容。",
    "Add rows of the other classes, or choose another response column.": "请加入其他类别的行，或选择另一列作为回答。",
    "The column {} holds whole numbers written with decimals; they are learned without: {} ({}).": "{} 列是带小数写法的整数，将按整数学习：{}（{:t}）。",
    "Write the column as text if the decimals are meant.": "如果确实需要小数，请把该列写成文本。",
    "The column {} mixes {} with {} ({}): what the model is to answer is not clear.": "{} 列中 {} 与 {} 混用（{:t}）：无法确定模型应回答什么。",
    "Write every response as the text to be learned, for example 0 and 1.": "请把每个回答写成要学习的文本，例如 0 和 1。",
    "Exact copies of earlier rows: {} ({}).": "与前面的行完全相同：{:t}（{:t}）。",
    "Remove them, or split by this program, which keeps copies on one side.": "请删除，或用本程序划分数据（重复的行会放在同一侧）。",
    "Check the path, and that you may read the file.": "请检查路径，并确认有读取权限。",
    # --- finetune: encoding
    "A longest prompt of {} tokens leaves no room for a question: its frame takes {}.": "提问最长 {} 个词元放不下任何问题：固定格式就占 {} 个。",
    "Raise the longest prompt to {} tokens or more.": "请把提问的最大长度提高到 {} 个词元或更多。",
    "A longest answer of {} tokens leaves no room for its text.": "回答最长 {} 个词元放不下任何正文。",
    "Raise the longest answer to {} tokens or more.": "请把回答的最大长度提高到 {} 个词元或更多。",
    "Without a prompt or a response: {} (line {}).": "没有提问或回答：{:t}（第 {:t} 行）。",
    "The encoding of the examples was stopped.": "样本的编码已停止。",
    "{} could not be read again after it was written.": "{} 写入后无法再读取。",
    "The encoded examples could not be written to {}: {}.": "编码后的样本无法写入 {}：{:t}。",
    "Free some disk space, or choose another folder.": "请清理磁盘空间，或选择其他文件夹。",
    # --- finetune: audit
    "Without a prompt: {} ({}).": "没有提问：{:t}（{:t}）。",
    "Without a response: {} ({}).": "没有回答：{:t}（{:t}）。",
    "Fill them in, or leave such rows out.": "请补全，或去掉这些行。",
    "The limit of {} tokens cuts {} of {} ({}): what is cut is never seen.": "{0} 个词元的上限截断了{2:t}中的 {1} 个（{3}）：截掉的部分模型看不到。",
    "The limit of {} tokens cuts {} of {} ({}): their end is never learned.": "{0} 个词元的上限截断了{2:t}中的 {1} 个（{3}）：结尾部分学不到。",
    "A limit of {} cuts fewer than 1 %, one of {} none.": "上限设为 {} 时截断不到 1 %，设为 {} 时不截断。",
    "Copies of earlier rows but for width, case or spaces: {} ({}).": "除全半角、大小写或空格外与前面的行相同：{:t}（{:t}）。",
    "{} with different responses, such as {} (line {}).": "{:t}有不同的回答，例如 {}（第 {:t} 行）。",
    "Decide on one class for each; whichever is wrong is learned too.": "请为每个问题确定一个类别；错误的类别也会被学到。",
    "Keep them if several answers are right.": "如果多个回答都对，可以保留。",
    "Asked in train as well: {} of dev ({}; {}); the scores on dev will be better than they are.": "训练集中也有的问题：验证集的{:t}（{}；{:t}）；验证集得分会偏高。",
    "Split again by this program, or remove them from one of the two.": "请用本程序重新划分，或从其中一侧删除。",
    "The class {} has {} rows, the class {} {}: a model that always answers the first looks good by accuracy.": "类别 {} 有 {} 行，类别 {} 只有 {} 行：总是回答前者的模型准确率看起来也很高。",
    "Add rows of the rare class, and look at the score of each class.": "请增加少数类别的行，并查看每个类别的得分。",
    "Fewer than {} rows in train: {}.": "训练集中不足 {} 行的类别：{}。",
    "Add rows of these classes, or join them with others.": "请增加这些类别的行，或与其他类别合并。",
    "Not in dev, so never measured: {}.": "验证集中没有、因此无法衡量的类别：{}。",
    "Split again by this program, which splits each class by itself.": "请用本程序重新划分（每个类别分别划分）。",
    "In dev, but not in train: {} ({}).": "验证集中有而训练集中没有的类别：{}（{:t}）。",
    "Add rows of these classes to train, or check how they are written.": "请把这些类别的行加入训练集，或检查写法是否一致。",
    # --- finetune: split
    "A dev share of {} and a test share of {} leave nothing to train on.": "验证集比例 {} 加测试集比例 {} 后没有可训练的数据。",
    "Choose shares from 0 to below 1, together below 1.": "请选择 0 到 1 之间（不含 1）的比例，两者之和小于 1。",
    "Different questions are too few for {} parts: {}.": "不同的问题太少，不够分成 {} 份：只有 {} 个。",
    "Add rows, or choose fewer parts.": "请增加数据行，或减少份数。",
    # --- finetune: the run
    "The output folder {} is in use.": "输出文件夹 {} 已被使用。",
    "Choose a new folder, resume, or let it be overwritten.": "请选择新文件夹、继续训练，或允许覆盖。",
    "{} does not look like the folder of a training, so it is not overwritten.": "{} 不像是训练的文件夹，因此没有覆盖。",
    "{} tokens of a prompt and {} of an answer do not fit into the model's context of {}.": "提问 {} 个词元加回答 {} 个词元超出了模型 {} 的上下文。",
    "Choose smaller limits.": "请选择更小的上限。",
    # --- the pages' own
    "There is no checkpoint in {}, nor up to two folders below it.": "{} 及其下两层文件夹中都没有检查点。",
    "{} was not loaded: {}: {}.": "{} 未能加载：{}：{}。",
    "The terminal shows where; choose another checkpoint, precision or device.": "出错位置见终端；请选择其他检查点、精度或设备。",
    "The test prompts were not answered: {}: {}.": "测试提示词未能得到回答：{}：{}。",
    "The terminal shows where; load the model again and repeat it.": "出错位置见终端；请重新加载模型后再试。",
    "{} carries a prefix of its own.": "{} 自身带有前缀。",
    "Choose the base without it.": "请选择不带前缀的基座。",
    "There is no sample {}.": "没有示例 {}。",
    "There are: {}.": "现有：{}。",
    "{} is a folder.": "{} 是文件夹。",
    "Give the path of a file in it.": "请给出其中某个文件的路径。",
    "The uploaded table is no longer in the workspace.": "上传的表格已不在工作区中。",
    "Upload it again.": "请重新上传。",
}

# Words and phrases of the program inside its sentences; only parts marked {:t} are looked up here.
WORDS: dict[str, str] = {
    "line {}": "第 {:t} 行",
    "row {}": "第 {:t} 行",
    "record {}": "第 {:t} 条记录",
    "{} prompt": "{} 个提问",
    "{} prompts": "{} 个提问",
    "{} response": "{} 个回答",
    "{} responses": "{} 个回答",
    "{} question": "{} 个问题",
    "{} questions": "{} 个问题",
    "file": "文件",
    "folder": "文件夹",
    "preparing": "准备中",
    "queued": "排队中",
    "running": "运行中",
    "done": "已完成",
    "paused": "已暂停",
    "cancelled": "已取消",
    "failed": "失败",
    "no columns": "无",
    "the job {}": "任务 {}",
    "The system prompt and the question take": "系统提示词和问题共占",
    "The question takes": "问题占",
    "{} and {} more": "{} 及其他 {}",
    "and {} more": "另有 {} 行",
    "line {} has {}": "第 {} 行有{:t}",
    "line {} has text after a closing quote": "第 {} 行在闭合引号之后还有文本",
    "has no key {}; it has {}": "没有键 {}；现有：{}",
    "has no key {}; it has a list": "没有键 {}；它是一个列表",
    "has no list of records under {}": "在 {} 下没有记录列表",
    "has records under several keys: {}": "在多个键下都有记录：{}",
    "has columns of different lengths ({})": "各列长度不同（{:t}）",
    "{} has {}": "{} 有 {} 项",
    "{} row": "{} 行",
    "{} rows": "{} 行",
    "{} blank row": "{} 个空行",
    "{} blank rows": "{} 个空行",
    "{} column": "{} 列",
    "{} columns": "{} 列",
    "{} cell": "{} 个单元格",
    "{} cells": "{} 个单元格",
    "{} line": "{} 行",
    "{} lines": "{} 行",
    "{} number": "{} 个数字",
    "{} numbers": "{} 个数字",
    "{} NUL character": "{} 个 NUL 字符",
    "{} NUL characters": "{} 个 NUL 字符",
    "commas": "逗号",
    "semicolons": "分号",
    "tabs": "制表符",
    "vertical bars": "竖线",
    "a PDF": "PDF 文件",
    "a gzip archive": "gzip 压缩包",
    "a 7-Zip archive": "7-Zip 压缩包",
    "a RAR archive": "RAR 压缩包",
    "a bzip2 archive": "bzip2 压缩包",
    "an xz archive": "xz 压缩包",
    "a zstd archive": "zstd 压缩包",
    "an Arrow or Feather file": "Arrow 或 Feather 文件",
    "a SQLite database": "SQLite 数据库",
    "a picture": "图片",
    # of adapters, models and tokenizers
    "a {} of {} layers, width {} and {} key/value heads of {}": "{0}（{1} 层，宽度 {2}，{3} 个 {4} 维的键值头）",
    "absent": "无",
    "adapter_model.safetensors or adapter_model.bin": "adapter_model.safetensors 或 adapter_model.bin",
    ", {}": "：{}",
    "; it was trained on {}": "；训练时所用的基座是 {}",
    "by an empty list": "（名称列表为空）",
    "layer {}": "第 {} 层",
    "layers of width {}": "宽度为 {} 的层",
    "is {}": "为 {:t}",
    "has {} layers": "只有 {} 层",
    "has width {}": "的宽度为 {}",
    "a multiple of {}": "{} 的倍数",
    "4, 8 or none": "4、8 或不设置",
    "[gMASK] ({}) or [MASK] ({})": "[gMASK]（{}）或 [MASK]（{}）",
    "the ranks do not count from 0": "排名不是从 0 开始连续编号",
    "{} of 256 bytes have no rank": "256 个字节中有 {} 个没有排名",
    "no call of a function": "不是函数调用",
    "not a call of tool_call with named arguments": "不是带命名参数的 tool_call 调用",
    "arguments without a name": "有参数没有名称",
    "no JSON object": "不是 JSON 对象",
    # of the system, SQLite and the JSON reader
    "[Errno {}] {}: {}": "[Errno {}] {:t}：{}",
    "[Errno {}] {}": "[Errno {}] {:t}",
    "No such file or directory": "没有该文件或文件夹",
    "Permission denied": "没有权限",
    "Operation not permitted": "操作不被允许",
    "No space left on device": "磁盘空间不足",
    "Disk quota exceeded": "超出磁盘配额",
    "Read-only file system": "文件系统为只读",
    "Is a directory": "这是文件夹",
    "Not a directory": "不是文件夹",
    "File exists": "文件已存在",
    "File name too long": "文件名过长",
    "Too many open files": "打开的文件过多",
    "Input/output error": "输入输出错误",
    "database or disk is full": "数据库或磁盘已满",
    "database is locked": "数据库被锁定",
    "unable to open database file": "无法打开数据库文件",
    "attempt to write a readonly database": "数据库为只读",
    "disk I/O error": "磁盘读写错误",
    "file is not a database": "文件不是数据库",
    "database disk image is malformed": "数据库文件已损坏",
    "{}: line {} column {} (char {})": "{:t}（第 {} 行第 {} 列，字符 {}）",
    "Expecting value": "缺少值",
    "Expecting ',' delimiter": "缺少逗号",
    "Expecting ':' delimiter": "缺少冒号",
    "Expecting property name enclosed in double quotes": "缺少双引号括起的键名",
    "Illegal trailing comma before end of object": "对象末尾有多余的逗号",
    "Illegal trailing comma before end of array": "数组末尾有多余的逗号",
    "Unterminated string starting at": "字符串没有结束",
    "Invalid control character at": "有无效的控制字符",
    "Invalid \\escape": "有无效的转义",
    "Invalid \\uXXXX escape": "有无效的 \\uXXXX 转义",
    "Extra data": "有多余的内容",
}

# What the parts of a template look like, where anything at all would take sentences that are not its own.
_COUNT = r"[\d,]+"
_STATE = "preparing|queued|running|done|paused|cancelled|failed"
SHAPES: dict[str, tuple[str, ...]] = {
    "{} is {}.": ("max_new_tokens|temperature|top_p|top_k|repetition_penalty", r"\S+"),
    "{} {}.": (".*?", "has (?:no key|no list of records|records under several keys|columns of different).*"),
    "There is no {} {}.": ("file|folder", ".*?"),
    "The {} {} is outside the folders this workbench may read ({}).": ("file|folder", ".*?", ".*?"),
    "The job is {}.": (_STATE,),
    "The job is {} already.": (_STATE,),
    "{} {} of it are not valid JSON (line {}).": (".*", f"{_COUNT} lines?", ".*?"),
    "{} {} tokens; there is room for {} ({} of context less {} kept for the answer).": (
        "The system prompt and the question take|The question takes", *[_COUNT] * 4,
    ),
    "{}: {}": (".*?", r"(?:adapter_config\.json has|The weight has values up to|[\d,]+ columns cannot be stored) .*"),
    "There is no {}.": (r".*\.(?:json|bin)",),
    "{} is missing.": (r"[\w.-]+\.\w+",),
    "The adapter adapts {}; {} {}.": (".*?", ".*?", r"is a ChatGLM.*|has \d+ layers|has width \d+"),
    "is {}": ("a ChatGLM.*",),
    "layer {}": (_COUNT,),
    "layers of width {}": (_COUNT,),
    "has {} layers": (_COUNT,),
    "has width {}": (_COUNT,),
    "a multiple of {}": (_COUNT,),
    "{} has {}": (".*?", _COUNT),
    "line {} has {}": (_COUNT, f"{_COUNT} cells?"),
    "line {} has text after a closing quote": (_COUNT,),
    "{} and {} more": (r"[\d, ]+", _COUNT),
    "and {} more": (_COUNT,),
    **dict.fromkeys(("line {}", "row {}", "record {}"), (r"[\d, ]+(?: and [\d,]+ more)?",)),
    **{word: (_COUNT,) for word in WORDS if re.fullmatch(r"\{\} [A-Za-z ]+", word)},
}  # fmt: skip

_END = re.compile(r"(?<=[.!?]) +(?=\S)")
_NO_SPACE_AFTER = ("。", "！", "？", "，", "；", "：", "）", "”")


def translated(text: str) -> str:
    """A sentence of the program, or several of them after each other, in Chinese; anything else as it is."""
    return _read(text, False)[1] if len(text) <= LONGEST else text


@dataclass(frozen=True)
class _Template:
    """An English template ready to be recognised, and the Chinese one in pieces: text, or (part, translate)."""

    literals: tuple[str, ...]
    pattern: re.Pattern[str]
    pieces: tuple[str | tuple[int, bool], ...]
    weight: int  # characters that are not parts

    def groups(self, text: str) -> tuple[str, ...] | None:
        """The parts of a text made from this template, else None; the cheap questions come first."""
        if not (text.startswith(self.literals[0]) and text.endswith(self.literals[-1])):
            return None
        if not all(literal in text for literal in self.literals):
            return None
        found = self.pattern.fullmatch(text)
        return found.groups() if found else None


def fields(template: str) -> Iterator[tuple[str, str | None, str]]:
    """The pieces of a template: (text before a part, the part's name or None, how it is shown)."""
    for literal, name, shown, _ in Formatter().parse(template):
        yield literal, name, shown or ""


def _template(english: str, chinese: str) -> _Template:
    literals, expression, parts = [""], "", 0
    shapes = SHAPES.get(english)
    for literal, name, _ in fields(english):
        literals[-1] += literal
        expression += re.escape(literal)
        if name is not None:
            expression += f"({shapes[parts] if shapes else '.*?'})"
            parts += 1
            literals.append("")
    pieces: list[str | tuple[int, bool]] = []
    number = 0
    for literal, name, shown in fields(chinese):
        pieces.append(literal)
        if name is not None:
            pieces.append((int(name) if name else number, shown == "t"))
            number += 1
    weight = sum(map(len, literals))
    return _Template(tuple(literals), re.compile(expression, re.DOTALL), tuple(pieces), weight)


@lru_cache(maxsize=2)
def _templates(words: bool) -> tuple[_Template, ...]:
    """All templates, the most telling first; with the words for a part of a sentence."""
    both = SENTENCES | WORDS if words else SENTENCES
    return tuple(sorted((_template(*pair) for pair in both.items()), key=lambda one: -one.weight))


@lru_cache(maxsize=8192)
def _match(text: str, words: bool) -> tuple[int, str] | None:
    """(characters recognised, Chinese) of a text that one template explains, else None; the best of them."""
    best: tuple[int, str] | None = None
    for one in _templates(words):
        groups = one.groups(text)
        if groups is None:
            continue
        weight, shown = one.weight, ""
        for piece in one.pieces:
            if isinstance(piece, str):
                shown = _beside(shown, piece)
                continue
            part = groups[piece[0]]
            if piece[1]:
                known, part = _part(part)
                weight += known
            shown = _beside(shown, part)
        if best is None or weight > best[0]:
            best = weight, shown
    return best


def _part(text: str) -> tuple[int, str]:
    """As `_read`, for a part in the program's own words, which may also be a list of them."""
    items = [_match(item, True) for item in text.split(", ")]
    if len(items) > 1 and all(items):
        known = [item for item in items if item]
        return sum(weight for weight, _ in known), "，".join(shown for _, shown in known)
    return _read(text, True)


@lru_cache(maxsize=2048)
def _read(text: str, words: bool) -> tuple[int, str]:
    """(characters recognised, Chinese): cut into sentences such that the most of it is recognised.

    A part may hold full stops itself, so each run of sentences is tried as one, from the last to the first.
    """
    ends = list(_END.finditer(text))[: MOST_SENTENCES - 1]
    starts = [0, *(end.end() for end in ends)]
    stops = [*(end.start() for end in ends), len(text)]
    best: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]  # of what follows: known, -pieces, pieces
    for first in reversed(range(len(starts))):
        choices = []
        for last in range(first, len(stops)):
            piece = text[starts[first] : stops[last]]
            weight, shown = _match(piece, words) or (0, piece)
            known, pieces, rest = best[last - first]
            choices.append((known + weight, pieces - 1, (shown, *rest)))
        best.insert(0, max(choices, key=lambda one: one[:2]))
    known, _, pieces = best[0]
    return (known, _joined(pieces)) if known else (0, text)


def _beside(before: str, after: str) -> str:
    """Two texts after each other, with a space between a Chinese character and a Latin letter or digit."""
    if before and after and _is_chinese(before[-1]) != _is_chinese(after[0]):
        other = after[0] if _is_chinese(before[-1]) else before[-1]
        if other.isascii() and other.isalnum():
            return f"{before} {after}"
    return before + after


def _is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def _joined(pieces: tuple[str, ...]) -> str:
    gaps = ("" if before.endswith(_NO_SPACE_AFTER) else " " for before, _ in pairwise(pieces))
    return pieces[0] + "".join(gap + piece for gap, piece in zip(gaps, pieces[1:], strict=True))
