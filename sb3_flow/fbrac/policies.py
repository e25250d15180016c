from sb3_flow.offline.policies import OfflinePolicy, WithDict, WithImages


class FBRACPolicy(OfflinePolicy):
    """
    Policy class of FBRAC: the ``bc_flow``, which acts, the ``critic`` and its target. Its parameters are those of
    :class:`~sb3_flow.offline.policies.OfflinePolicy`.
    """

    network_names = ("bc_flow", "critic", "critic_target")


class FBRACCnnPolicy(WithImages, FBRACPolicy):
    """
    Policy class of FBRAC for image observations: :class:`.FBRACPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class FBRACMultiInputPolicy(WithDict, FBRACPolicy):
    """
    Policy class of FBRAC for ``Dict`` observations: :class:`.FBRACPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = FBRACPolicy
CnnPolicy = FBRACCnnPolicy
MultiInputPolicy = FBRACMultiInputPolicy
