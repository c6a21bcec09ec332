--- What one URI and the options of a connection make together: where to connect, and as whom.
-- @module moonrabbit.connection.target

local uri = require "moonrabbit.uri"

local function with_tls(parsed, tls)
  if tls == nil then return end
  if tls == false then
    parsed.tls = nil
    return
  end
  if not parsed.tls and parsed.port == 5672 and not parsed.port_given then parsed.port = 5671 end
  parsed.tls = parsed.tls or { verify = true }
  if type(tls) == "table" then
    for key, value in pairs(tls) do parsed.tls[key] = value end
  end
end

--- A target, or nil and what is wrong with the URI.
---@param text string a URI
---@param opts moonrabbit.ConnectOptions
---@return table|nil, string?
local function target(text, opts)
  local parsed, problem = uri.parse(text)
  if not parsed then return nil, problem end
  parsed.vhost = opts.vhost or parsed.vhost
  parsed.user = opts.user or parsed.user or "guest"
  -- A user without a password gets the default one, as in the other clients.
  if opts.password ~= nil then parsed.password = opts.password else parsed.password = parsed.password or "guest" end
  parsed.mechanism = opts.mechanism or parsed.mechanism or "PLAIN"
  parsed.heartbeat = opts.heartbeat or parsed.heartbeat or 60
  parsed.frame_max = opts.frame_max or parsed.frame_max
  parsed.channel_max = opts.channel_max or parsed.channel_max
  parsed.connect_timeout = opts.connect_timeout or parsed.connect_timeout or 10
  with_tls(parsed, opts.tls)
  if parsed.tls then parsed.tls.server_name = parsed.tls.server_name or parsed.host end
  if parsed.mechanism == "PLAIN" and parsed.user:find "%z" then
    return nil, "option 'user' holds a zero byte"
  end
  return parsed
end

return target
