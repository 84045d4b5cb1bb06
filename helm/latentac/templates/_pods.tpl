{{/* What PodSecurity's level restricted asks of a container, and a read-only root besides. */}}
{{- define "latentac.containerSecurity" -}}
runAsNonRoot: true
{{- with .Values.security.user }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .Values.security.group }}
runAsGroup: {{ int64 . }}
{{- end }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "latentac.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.security.user }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .Values.security.group }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- with .Values.security.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Fields of each pod of the chart: none of them talks to the API server. Arguments: root, placement (optional). */}}
{{- define "latentac.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "latentac.podSecurity" .root | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .placement }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fields of each container. Arguments: root, image, resources. */}}
{{- define "latentac.container" -}}
image: {{ include "latentac.image" (dict "root" .root "name" .image) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
securityContext:
  {{- include "latentac.containerSecurity" .root | nindent 2 }}
resources:
  {{- toYaml .resources | nindent 2 }}
{{- end }}
