--- AMQP URIs: `amqp[s]://user:password@host:port/vhost?query`.
--
-- Follows https://www.rabbitmq.com/docs/uri-spec and
-- https://www.rabbitmq.com/docs/uri-query-parameters, but for one thing: an empty path and `/` both
-- mean the vhost `/`. User, password, host and vhost are percent-decoded. A host that starts with an
-- encoded slash (`%2Frun%2Frabbitmq.sock`) is the path of a unix socket.
--
-- `amqp+srv://` and `amqps+srv://` name a service of DNS instead of a host: `amqp+srv://user@_amqp._tcp.example.com/`.
-- A name that does not start with `_` gets `_amqp._tcp.` (`_amqps._tcp.`) before it. There is no port: the SRV
-- records have it.
--
-- | query parameter | becomes |
-- | --- | --- |
-- | `heartbeat` | `heartbeat`, seconds |
-- | `connection_timeout` | `connect_timeout`; milliseconds in the URI, seconds in the result |
-- | `channel_max`, `frame_max` | the same |
-- | `auth_mechanism` | `mechanism`: `plain`, `amqplain` or `external`; of several the first counts |
-- | `cacertfile`, `certfile`, `keyfile` | `tls.ca`, `tls.cert`, `tls.key` |
-- | `verify` | `tls.verify`: `verify_peer` (the default here) or `verify_none` |
-- | `server_name_indication` | `tls.server_name` |
-- | `fail_if_no_peer_cert` | nothing: it is for servers |
--
-- No message of this module quotes the URI: it may hold a password anywhere.
-- @module moonrabbit.uri

local options = require "moonrabbit.options"

local uri = {}

local tonumber = tonumber

---@class moonrabbit.Uri
---@field host string            "localhost" when the URI has none
---@field port integer           5672, or 5671 for amqps
---@field srv string?            the name of a service: `host` and `port` are then those of its SRV records, and not here
---@field port_given boolean     whether the URI names a port: false, the one in `port` is the default
---@field path string?           of a unix socket, instead of host and port
---@field vhost string          "/" when the URI has none
---@field user string?           nil when the URI has none
---@field password string?       nil when the URI has none
---@field tls table?             present for amqps: { ca, cert, key, verify, server_name }
---@field heartbeat integer?     seconds
---@field connect_timeout number? seconds
---@field channel_max integer?
---@field frame_max integer?     bytes
---@field mechanism string?      "PLAIN", "AMQPLAIN" or "EXTERNAL"

-- Decodes %XX. nil, what is wrong.
local function decode(text, what)
  if text:find "[%z\1-\32\127]" then
    return nil, "the " .. what .. " holds a space or a control character: percent-encode it"
  end
  if text:gsub("%%%x%x", ""):find("%", 1, true) then
    return nil, "the " .. what .. " holds a % that two hexadecimal digits do not follow: write it %25"
  end
  local decoded = text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
  if decoded:find("%z") then return nil, "the " .. what .. " holds a zero byte" end
  return decoded
end

local function count(text, max, min)
  if not text:find "^%d%d?%d?%d?%d?%d?%d?%d?%d?%d?$" then return nil end
  local n = tonumber(text, 10)
  if n < (min or 0) or n > max then return nil end
  return n
end

local function is_ipv6(text)
  local address = text:match "^([^%%]*)%%[%w%._~-]+$" or text
  if not address:find "^[%x:]*[%d%.]*$" or not address:find(":", 1, true) then return false end
  if address:find(":::", 1, true) or select(2, address:gsub("::", "")) > 1 then return false end
  local groups = 0
  for group in address:gmatch "[^:]+" do
    groups = groups + 1
    if group:find(".", 1, true) then
      local a, b, c, d = group:match "^(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)$"
      if not a or tonumber(a) > 255 or tonumber(b) > 255 or tonumber(c) > 255 or tonumber(d) > 255
        or address:sub(-#group) ~= group then
        return false
      end
      groups = groups + 1
    elseif #group > 4 then
      return false
    end
  end
  if address:find("::", 1, true) then return groups < 8 end
  return groups == 8 and not address:find "^:" and not address:find ":$"
end

-- Each takes (result, value) and returns what is wrong, or nil.
local parameters = {}

local function number_parameter(name, max, scale)
  return function(result, value)
    local n = count(value, max)
    if not n then return "an integer from 0 to " .. max end
    result[name] = scale and n / scale or n
  end
end

local function tls_parameter(name)
  return function(result, value)
    if value == "" then return "a path" end
    result.tls[name] = value
  end
end

parameters.heartbeat = number_parameter("heartbeat", 65535)
parameters.channel_max = number_parameter("channel_max", 65535)

-- AMQP's least is 4096; 0 leaves it to the library.
function parameters.frame_max(result, value)
  local n = count(value, 2147483647)
  if not n or n > 0 and n < 4096 then return "an integer from 4096 to 2147483647, or 0" end
  result.frame_max = n
end

parameters.connection_timeout = number_parameter("connect_timeout", 2147483647, 1000)
parameters.cacertfile = tls_parameter "ca"
parameters.certfile = tls_parameter "cert"
parameters.keyfile = tls_parameter "key"
parameters.fail_if_no_peer_cert = function() end

function parameters.server_name_indication(result, value)
  if value == "" or value == "disable" then return "a host name: to check none, use verify=verify_none" end
  result.tls.server_name = value
end

function parameters.verify(result, value)
  if value == "verify_peer" then
    result.tls.verify = true
  elseif value == "verify_none" then
    result.tls.verify = false
  else
    return "verify_peer or verify_none"
  end
end

function parameters.auth_mechanism(result, value)
  local name = value:upper()
  if name ~= "PLAIN" and name ~= "AMQPLAIN" and name ~= "EXTERNAL" then return "plain, amqplain or external" end
  result.mechanism = result.mechanism or name
end

local tls_only = { cacertfile = true, certfile = true, keyfile = true, verify = true, server_name_indication = true,
  fail_if_no_peer_cert = true }

local function parse_query(result, query)
  for pair in query:gmatch "[^&]+" do
    local key, value = pair:match "^([^=]*)=(.*)$"
    if not key then key, value = pair, "" end
    local problem
    key, problem = decode(key, "query")
    if not key then return problem end
    value, problem = decode(value, "query")
    if not value then return problem end
    local set = parameters[key]
    if not set then
      -- Quoted only when it can be no piece of a password that was not encoded.
      local hint = options.nearest(key, parameters)
      return "the query holds an unknown parameter" .. (hint and ": did you mean '" .. hint .. "'?" or "")
    end
    if tls_only[key] and not result.tls then return "the parameter '" .. key .. "' needs an amqps URI" end
    local expected = set(result, value)
    if expected then return "the parameter '" .. key .. "' must be " .. expected end
  end
end

local function parse_userinfo(result, userinfo)
  if userinfo:find("@", 1, true) then
    return "the user or the password holds an @: write it %40"
  end
  local user, password = userinfo:match "^([^:]*):(.*)$"
  if not user then user = userinfo end
  local problem
  result.user, problem = decode(user, "user")
  if problem then return problem end
  if password then
    result.password, problem = decode(password, "password")
    if problem then return problem end
  end
end

local function parse_host(result, text, default)
  local host, rest
  if text:sub(1, 1) == "[" then
    host, rest = text:match "^%[([^%]]*)%](.*)$"
    if not host then return "the IPv6 address lacks its ]" end
    host = host:gsub("%%25", "%%")
    if not is_ipv6(host) then return "what stands between [ and ] is not an IPv6 address" end
    if rest ~= "" and rest:sub(1, 1) ~= ":" then return "only a port may follow the ]" end
    rest = rest:sub(2)
  else
    host, rest = text:match "^([^:]*):?(.*)$"
    if rest:find(":", 1, true) then
      return "there are several : in the host; an IPv6 address stands in brackets: [::1]"
    end
    local problem
    host, problem = decode(host, "host")
    if not host then return problem end
    if host:sub(1, 1) == "/" then
      if rest ~= "" then return "a unix socket has no port" end
      result.path = host
    elseif host:find "[^%w%.%-_~\128-\255]" then
      return "the host holds a character that no host name has (is one in the user or password not percent-encoded?)"
    end
  end
  if rest ~= "" then
    local port = count(rest, 65535, 1)
    if not port then
      return "the port is not a number from 1 to 65535 (is a character of the password not percent-encoded?)"
    end
    result.port = port
    result.port_given = true
  end
  if result.path then
    result.port = nil
  else
    result.host = host ~= "" and host or default
  end
end

-- The host is the name of a service.
local function name_service(result, scheme)
  if result.path or result.port_given or not result.host:find "%a" or result.host:find ":" then
    return "a service of DNS has a name, and no port"
  end
  local name = result.host
  result.srv = name:sub(1, 1) == "_" and name or ("_%s._tcp.%s"):format(scheme, name)
  result.port = nil
end

--- Parses an AMQP URI.
---@param text string
---@return moonrabbit.Uri|nil
---@return string? problem   never quotes the URI
function uri.parse(text)
  if type(text) ~= "string" then error("uri.parse: the URI must be a string, not a " .. type(text), 2) end
  if #text > 65536 then return nil, "invalid AMQP URI: it is longer than 64 KiB" end
  local scheme, rest = text:match "^(%a[%w+.-]*)://(.*)$"
  scheme = scheme and scheme:lower()
  local base = scheme and scheme:gsub("%+srv$", "")
  if base ~= "amqp" and base ~= "amqps" then
    return nil, "invalid AMQP URI: it must start with amqp:// or amqps:// (or amqp+srv://, amqps+srv://)"
  end
  local problem
  if rest:find("#", 1, true) then
    return nil, "invalid AMQP URI: it holds a #: write it %23"
  end
  local before, query = rest:match "^([^?]*)%??(.*)$"
  local authority, path = before:match "^([^/]*)(.*)$"
  local result = { vhost = "/", port_given = false }
  if base == "amqps" then
    result.tls = { verify = true }
    result.port = 5671
  else
    result.port = 5672
  end
  local userinfo, host = authority:match "^(.*)@([^@]*)$"
  if userinfo then
    problem = parse_userinfo(result, userinfo)
  else
    host = authority
  end
  -- A service has no default.
  problem = problem or parse_host(result, host, base == scheme and "localhost" or "")
  if not problem and base ~= scheme then problem = name_service(result, base) end
  if not problem and #path > 1 then
    local segment = path:sub(2)
    if segment:find("/", 1, true) then
      problem = "the vhost holds a /: write it %2F"
    else
      result.vhost, problem = decode(segment, "vhost")
      if result.vhost and #result.vhost > 255 then problem = "the vhost is longer than 255 bytes" end
    end
  end
  problem = problem or parse_query(result, query)
  if problem then return nil, "invalid AMQP URI: " .. problem end
  return result
end

local function encode(text)
  return (text:gsub("[^%w%-%._~]", function(c) return ("%%%02X"):format(c:byte()) end))
end

--- The "host:port" of a parsed URI (brackets around IPv6), or the path of its socket.
---@param parsed moonrabbit.Uri
---@return string
function uri.endpoint(parsed)
  if parsed.path then return parsed.path end
  if parsed.srv then return parsed.srv end
  local host = parsed.host
  if host:find(":", 1, true) then host = "[" .. host .. "]" end
  return host .. ":" .. parsed.port
end

--- A URI for logs: without password and query.
---@param parsed moonrabbit.Uri
---@return string
function uri.redacted(parsed)
  local host = parsed.path and encode(parsed.path) or uri.endpoint(parsed)
  local scheme = (parsed.tls and "amqps" or "amqp") .. (parsed.srv and "+srv" or "")
  return scheme .. "://" .. (parsed.user and encode(parsed.user) .. "@" or "")
    .. host .. "/" .. (parsed.vhost == "/" and "" or encode(parsed.vhost))
end

return uri
