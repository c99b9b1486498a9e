"""Local text files as a dataset of tensorflow-datasets, for programs that read such datasets.

    tfds.builder("text_files", file_format="array_record").download_and_prepare()

reads train, valid and test (.txt, .txt.gz or .txt.xz; missing splits are allowed) from downloads/manual/text_files in
the directory of tensorflow-datasets. A form feed separates documents. After changing the text, remove text_files/1.0.0
in that directory.
"""

import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from sedd_jax.data import documents, text_files

Examples = Iterator[tuple[int, dict[str, str]]]


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One example per document of local text files, in order."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put train.txt, valid.txt and test.txt (or .txt.gz, .txt.xz) into text_files."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents of local text files.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        pattern = pathlib.Path(dl_manager.manual_dir) / "text_files" / "{split}.txt*"
        corpus = text_files.read_text(str(pattern))
        return {split: self._generate_examples(corpus, split) for split in corpus.splits}

    def _generate_examples(self, corpus: documents.Corpus, split: str) -> Examples:
        for index, document in enumerate(corpus.read(split)):
            yield index, {"text": document.text}
