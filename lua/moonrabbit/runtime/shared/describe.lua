--- An endpoint for people: "HOST:PORT" or "unix:PATH".
---@param endpoint { host: string?, port: integer?, path: string? }
---@return string
return function(endpoint)
  if endpoint.path then return "unix:" .. endpoint.path end
  local host = endpoint.host
  if host:find(":", 1, true) and host:sub(1, 1) ~= "[" then host = "[" .. host .. "]" end
  return host .. ":" .. endpoint.port
end
