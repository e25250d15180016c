from sb3_flow.offline.policies import OfflinePolicy, ValueNetwork, WithDict, WithImages


class FAWACPolicy(OfflinePolicy):
    """
    Policy class of FAWAC: the ``bc_flow``, which acts, the ``critic`` and its target, and the ``value``. Its parameters are
    those of :class:`~sb3_flow.offline.policies.OfflinePolicy`.
    """

    network_names = ("bc_flow", "critic", "critic_target", "value")
    value: ValueNetwork


class FAWACCnnPolicy(WithImages, FAWACPolicy):
    """
    Policy class of FAWAC for image observations: :class:`.FAWACPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class FAWACMultiInputPolicy(WithDict, FAWACPolicy):
    """
    Policy class of FAWAC for ``Dict`` observations: :class:`.FAWACPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = FAWACPolicy
CnnPolicy = FAWACCnnPolicy
MultiInputPolicy = FAWACMultiInputPolicy
