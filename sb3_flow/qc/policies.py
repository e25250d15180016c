from sb3_flow.offline.policies import BestOfSamplesPolicy, WithDict, WithImages


class QCPolicy(BestOfSamplesPolicy):
    """
    Policy class of QC: the ``bc_flow``, the ``critic`` and its target. It acts by the best of several chunks of the flow, in
    the mean of the critics. Its parameters are those of :class:`~sb3_flow.offline.policies.BestOfSamplesPolicy`.
    """

    network_names = ("bc_flow", "critic", "critic_target")
    q_agg = "mean"


class QCCnnPolicy(WithImages, QCPolicy):
    """
    Policy class of QC for image observations: :class:`.QCPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class QCMultiInputPolicy(WithDict, QCPolicy):
    """
    Policy class of QC for ``Dict`` observations: :class:`.QCPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = QCPolicy
CnnPolicy = QCCnnPolicy
MultiInputPolicy = QCMultiInputPolicy
