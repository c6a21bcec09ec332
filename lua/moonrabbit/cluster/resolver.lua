--- Asks name servers for SRV records, over TCP (RFC 7766) and the runtime's own transport: it works on every
-- runtime, and blocks no loop.
--
-- The servers and the search list are those of /etc/resolv.conf unless the option `dns` names others.
-- @module moonrabbit.cluster.resolver

local dns = require "moonrabbit.cluster.dns"
local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"
local random = require "moonrabbit.random"

local resolver = {}

local CONF = "/etc/resolv.conf"
local PORT = 53
local MOST_SERVERS = 3

---@class moonrabbit.DnsOptions
---@field servers string[]?  name servers: "10.0.0.2", "127.0.0.1:8600", "[::1]:53"; those of /etc/resolv.conf by default
---@field search string[]?   domains to try after a name that is not found; those of /etc/resolv.conf by default
---@field timeout number?    seconds that a server may take; 3 by default

-- ---- Configuration ----------------------------------------------------------------------------------

--- Address and port of a server, or nil.
---@package
function resolver.server(text)
  local host, port = text:match "^%[([%x:%.%%%w]+)%]:?(%d*)$"
  if not host then host, port = text:match "^([%d%.]+):?(%d*)$" end
  if not host and text:find "^[%x:%.]+%%?%w*$" and text:find ":.*:" then host, port = text, "" end
  if not host then return nil end
  port = port ~= "" and tonumber(port) or PORT
  if port < 1 or port > 65535 then return nil end
  return { host = host, port = port }
end

local function server_kind(value)
  if type(value) ~= "string" or not resolver.server(value) then return "an address" end
end

--- What the option `dns` may say.
resolver.options = {
  servers = options.list_of(server_kind, 'a list of addresses of name servers, such as "10.0.0.2" or "[::1]:53"', 1),
  search = options.list_of(options.string, "a list of domains"), timeout = options.seconds,
}

--- Reads the text of a resolv.conf.
---@package
---@return { servers: string[], search: string[], ndots: integer }
function resolver.parse(text)
  local conf = { servers = {}, search = {}, ndots = 1 }
  for line in (text .. "\n"):gmatch "([^\n]*)\n" do
    local keyword, rest = line:match "^%s*(%a+)%s+(.-)%s*$"
    if keyword == "nameserver" and resolver.server(rest) and #conf.servers < MOST_SERVERS then
      conf.servers[#conf.servers + 1] = rest
    elseif keyword == "search" or keyword == "domain" then
      conf.search = {}
      for domain in rest:gmatch "%S+" do conf.search[#conf.search + 1] = domain end
    elseif keyword == "options" then
      conf.ndots = tonumber(rest:match "ndots:(%d+)") or conf.ndots
    end
  end
  return conf
end

local function configuration(given)
  local file = io.open(CONF, "r")
  local conf = resolver.parse(file and file:read "*a" or "")
  if file then file:close() end
  if given.servers then conf.servers = given.servers end
  if given.search then conf.search = given.search end
  if #conf.servers == 0 then conf.servers = { "127.0.0.1" } end
  return conf
end

--- The full names to ask for, in order: like the C library, a name with at least `ndots` dots is tried as it is
--- first, any other last; with a dot at its end, only as it is.
---@package
function resolver.candidates(name, conf)
  if name:sub(-1) == "." then return { (name:gsub("%.$", "")) } end
  local _, dots = name:gsub("%.", "")
  local list = {}
  for _, domain in ipairs(conf.search) do
    local full = name .. "." .. domain:gsub("%.$", "")
    if dns.is_name(full) then list[#list + 1] = full end
  end
  table.insert(list, dots >= conf.ndots and 1 or #list + 1, name)
  return list
end

-- ---- Asking -----------------------------------------------------------------------------------------

local function read_exactly(transport, count, deadline, now, rest)
  local bytes = rest
  while #bytes < count do
    local left = deadline - now()
    if left <= 0 then return nil, "timeout" end
    local more, kind = transport:read(65536, left)
    if not more then return nil, kind end
    bytes = bytes .. more
  end
  return bytes:sub(1, count), bytes:sub(count + 1)
end

local function exchange(transport, question, deadline, now)
  local length = #question
  local sent, kind = transport:write(string.char(math.floor(length / 256), length % 256) .. question,
    math.max(0, deadline - now()))
  if not sent then return nil, kind end
  local prefix, rest = read_exactly(transport, 2, deadline, now, "")
  if not prefix then return nil, rest end
  local a, b = prefix:byte(1, 2)
  return read_exactly(transport, a * 256 + b, deadline, now, rest)
end

local function ask_server(runtime, server, name, id, timeout)
  local now = runtime.now
  local deadline = now() + timeout
  local transport, kind = runtime.open(server, nil, timeout)
  if not transport then return nil, kind end
  local whole, bytes, why = protect(exchange, transport, dns.question(id, name), deadline, now)
  transport:close()
  if not whole then error(bytes, 0) end -- the task was cancelled
  if not bytes then return nil, why end
  return dns.answer(bytes, id)
end

-- One name at each server until one knows. nil, code, whether that is an answer ("there is none").
local function ask(runtime, conf, name, id, timeout)
  local why = "no name server is configured"
  for _, text in ipairs(conf.servers) do
    local server = resolver.server(text)
    if server then
      local records, code = ask_server(runtime, server, name, id, timeout)
      if records and #records > 0 then return records end
      if records or code == "NXDOMAIN" then return nil, records and "it has no SRV records" or code, true end
      why = text .. ": " .. tostring(code)
    else
      why = "'" .. text .. "' is no address of a name server"
    end
  end
  return nil, why, false
end

--- The SRV records of a name, in the order in which they are to be tried. May yield.
---@param runtime table
---@param name string
---@param opts moonrabbit.DnsOptions?
---@param draw (fun(): number)?   random.number by default
---@return { host: string, port: integer }[]|nil, string? text   why there is none
function resolver.srv(runtime, name, opts, draw)
  opts = opts or {}
  draw = draw or random.number
  if not dns.is_name(name) then return nil, "'" .. name .. "' is no name that DNS can have" end
  local conf = configuration(opts)
  local why
  for _, full in ipairs(resolver.candidates(name, conf)) do
    local records, code, answered = ask(runtime, conf, full, math.floor(draw() * 65536), opts.timeout or 3)
    if records then
      local list = {}
      for i, record in ipairs(dns.order(records, draw)) do list[i] = { host = record.target, port = record.port } end
      return list
    end
    if not why or not answered then why = code end
    if not answered then break end
  end
  return nil, ("no SRV records of %s: %s"):format(name, why)
end

return resolver
