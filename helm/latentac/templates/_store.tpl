{{- define "latentac.storeUrl" -}}
{{ .Values.store.url | default (ternary "s3://latentac/store" "" .Values.minio.enabled) }}
{{- end }}

{{- define "latentac.storeEndpoint" -}}
{{- $bundled := printf "http://%s-minio.%s.svc:9000" .Release.Name .Release.Namespace -}}
{{ .Values.store.endpoint | trimSuffix "/" | default (ternary $bundled "" .Values.minio.enabled) }}
{{- end }}

{{/* host:port of the endpoint, and its port alone. */}}
{{- define "latentac.storeHost" -}}
{{ include "latentac.storeEndpoint" . | trimPrefix "https://" | trimPrefix "http://" }}
{{- end }}
{{- define "latentac.storePort" -}}
{{- $port := regexFind ":[0-9]+$" (include "latentac.storeHost" .) | trimPrefix ":" -}}
{{ $port | default (ternary "443" "80" (hasPrefix "https://" (include "latentac.storeEndpoint" .))) }}
{{- end }}

{{- define "latentac.storeSecret" -}}
{{ default (printf "%s-s3" .Release.Name) .Values.store.existingSecret }}
{{- end }}

{{/* Environment by which a container finds the store. */}}
{{- define "latentac.storeEnv" -}}
- {name: LATENTAC_S3_ENDPOINT, value: {{ include "latentac.storeEndpoint" . | quote }}}
- {name: AWS_REGION, value: {{ .Values.store.region | quote }}}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ include "latentac.storeSecret" $ }}, key: {{ . }}}}
{{- end }}
{{- if .Values.store.caConfigMap }}
- {name: LATENTAC_S3_CA, value: /etc/latentac-ca/ca.crt}
{{- end }}
{{- end }}

{{/* The endpoint's authority, as a list of volumes and of mounts. */}}
{{- define "latentac.storeVolumes" -}}
{{- with .Values.store.caConfigMap }}
- {name: ca, configMap: {name: {{ . }}}}
{{- end }}
{{- end }}
{{- define "latentac.storeMounts" -}}
{{- if .Values.store.caConfigMap }}
- {name: ca, mountPath: /etc/latentac-ca, readOnly: true}
{{- end }}
{{- end }}
