{{/* Quantities as text, whatever a values file wrote. Arguments: requests, limits. */}}
{{- define "latentac.resources" -}}
{{- $resources := dict -}}
{{- range $kind, $quantities := . -}}
{{- $text := dict -}}
{{- range $name, $quantity := $quantities -}}{{- $_ := set $text $name (toString $quantity) -}}{{- end -}}
{{- $_ := set $resources $kind $text -}}
{{- end -}}
{{ $resources | toJson }}
{{- end }}

{{/* Placement of settings.py from one of ours. */}}
{{- define "latentac.placement" -}}
{{ dict "resources" (include "latentac.resources" .resources | fromJson) "node_selector" (default dict .nodeSelector)
   "tolerations" (default list .tolerations) | toJson }}
{{- end }}

{{/* cluster.yaml, field by field as components/cluster/settings.py has them. */}}
{{- define "latentac.settings" -}}
{{- $steps := .Values.pipeline -}}
{{- $train := .Values.train -}}
{{- $serving := .Values.serving -}}
release: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
images:
  {{- range list "pipeline" "train" "serve" }}
  {{ . }}: {{ include "latentac.image" (dict "root" $ "name" .) | quote }}
  {{- end }}
  pull_policy: {{ .Values.images.pullPolicy }}
  pull_secrets: {{ .Values.images.pullSecrets | toJson }}
store:
  url: {{ include "latentac.storeUrl" . | quote }}
  endpoint: {{ include "latentac.storeEndpoint" . | quote }}
  region: {{ .Values.store.region | quote }}
  secret: {{ include "latentac.storeSecret" . }}
  ca_config_map: {{ .Values.store.caConfigMap | quote }}
security:
  {{- range $ours, $theirs := dict "user" "user" "group" "group" "fsGroup" "fs_group" }}
  {{ $theirs }}: {{ with index $.Values.security $ours }}{{ int64 . }}{{ else }}null{{ end }}
  {{- end }}
steps:
  namespace: {{ include "latentac.stepsNamespace" . }}
  service_account: {{ include "latentac.pipelineAccount" . }}
  compute: {{ include "latentac.placement" $steps.compute }}
  launch: {{ include "latentac.placement" $steps.launch }}
  work_size: {{ $steps.workSize | quote }}
  shared_memory: {{ $steps.sharedMemory | quote }}
train:
  {{- include "latentac.placement" $train | fromJson | toYaml | nindent 2 }}
  service_account: {{ .Release.Name }}-train
  queue: {{ $train.queue.name }}
  min_replicas: {{ int64 $train.replicas.min }}
  max_replicas: {{ int64 $train.replicas.max }}
  processes: {{ int64 $train.processes }}
  priority_class: {{ $train.priorityClass | quote }}
  shared_memory: {{ $train.sharedMemory | quote }}
  work_size: {{ $train.workSize | quote }}
  max_restarts: {{ int64 $train.maxRestarts }}
  max_retries: {{ int64 $train.maxRetries }}
  grace_seconds: {{ int64 $train.graceSeconds }}
  pending_seconds: {{ $train.pendingSeconds }}
  keep_seconds: {{ int64 $train.keepSeconds }}
  lease_seconds: {{ int64 $train.leaseSeconds }}
  secrets: {{ $train.secrets | toJson }}
  config_maps: {{ $train.configMaps | toJson }}
deploy:
  {{- include "latentac.placement" $serving | fromJson | toYaml | nindent 2 }}
  name: {{ $serving.name }}
  project: {{ $serving.project | quote }}
  runtime: {{ .Release.Name }}
  service_account: {{ .Release.Name }}-serve
  replicas: {{ int64 $serving.replicas }}
  strategy: {{ $serving.strategy }}
  ready_seconds: {{ $serving.readySeconds }}
  failing_seconds: {{ $serving.failingSeconds }}
  grace_seconds: {{ int64 $serving.graceSeconds }}
  request_seconds: {{ $serving.requestSeconds }}
  shadow_prompts: {{ int64 $serving.shadowPrompts }}
  max_error_fraction: {{ $serving.maxErrorFraction }}
  max_latency_ratio: {{ $serving.maxLatencyRatio }}
  max_reward_loss: {{ $serving.maxRewardLoss }}
  token_secret: {{ $serving.tokenSecret | quote }}
  {{- with $serving.gateway }}
  gateway: {{ toJson . }}
  {{- end }}
{{- end }}
