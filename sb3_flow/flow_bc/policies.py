from typing import Any

from sb3_flow.offline.policies import OfflinePolicy, WithDict, WithImages


class FlowBCPolicy(OfflinePolicy):
    """
    Policy class of FlowBC: the ``bc_flow``, which acts. Its parameters are those of
    :class:`~sb3_flow.offline.policies.OfflinePolicy`, but for those of critics.
    """

    network_names = ("bc_flow",)

    def __init__(self, *args, **kwargs):
        for name in ("n_critics", "layer_norm"):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument '{name}': it has no critics")
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("n_critics", "layer_norm"):
            del data[name]
        return data


class FlowBCCnnPolicy(WithImages, FlowBCPolicy):
    """
    Policy class of FlowBC for image observations: :class:`.FlowBCPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class FlowBCMultiInputPolicy(WithDict, FlowBCPolicy):
    """
    Policy class of FlowBC for ``Dict`` observations: :class:`.FlowBCPolicy` with a ``CombinedExtractor`` as the default
    features extractor.
    """


MlpPolicy = FlowBCPolicy
CnnPolicy = FlowBCCnnPolicy
MultiInputPolicy = FlowBCMultiInputPolicy
