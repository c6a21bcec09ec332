--- The management API of a broker: RabbitMQ's HTTP API, on any runtime, without blocking its loop.
--
--     local management = require "moonrabbit.management"
--     local api = management.new "http://guest:guest@localhost:15672"
--     for _, node in ipairs(assert(api:nodes())) do print(node.name, node.running) end
--     assert(api:set_policy("/", "mirrored", { pattern = "^orders", definition = { ["ha-mode"] = "all" } }))
--
-- The broker needs the plugin rabbitmq_management. https://www.rabbitmq.com/docs/management#http-api
-- Needs LuaSocket (its HTTP client; the bytes go through the runtime) and lua-cjson.
--
-- What the API answers is returned as the tables that it sent: names and fields are RabbitMQ's own. Each
-- function has the path it stands for in its description. A path's names are percent-encoded here.
--
-- Errors are those of moonrabbit.errors: the kinds of a connection (`dns`, `refused`, `timeout`, `tls`,
-- `closed`), `protocol` for an answer that is no HTTP or not the JSON that it should be, `auth` for 401 and
-- 403 (a wrong password, or a user who lacks the tag for it), `http` for every other refusal, with the status in err.code and the broker's
-- reason in err.message, and `overflow` for an answer beyond `max_body`. None holds the password.
-- @module moonrabbit.management

local errors = require "moonrabbit.errors"
local http = require "moonrabbit.management.http"
local json = require "moonrabbit.management.json"
local options = require "moonrabbit.options"
local add_parts = require "moonrabbit.parts"
local runtimes = require "moonrabbit.runtime"
local secret = require "moonrabbit.secret"

local management = {}

---@class moonrabbit.ManagementOptions
---@field uri string?        `http[s]://user:password@host:port/prefix`; "http://localhost:15672" by default
---@field user string?       instead of the URI's; "guest" by default
---@field password (string|fun(): string|nil, string?)?  instead of the URI's; "guest" by default. A function is called before each request, and answers the password, or nil and why there is none
---@field token string?      an OAuth 2 token, sent instead of user and password
---@field tls moonrabbit.TlsOptions?  of `https`
---@field timeout number?    seconds that a request may take, the connecting included; 10 by default
---@field max_body integer?  bytes of an answer; 64 MiB by default
---@field runtime (string|table)?  as for moonrabbit.connect; "native" by default

---@class moonrabbit.Management
---@field endpoint string    "host:port"
local Management = {}
Management.__index = Management
Management.__name = "moonrabbit.Management"

local tls_options = {
  ca = options.string, cert = options.string, key = options.string, verify = options.boolean,
  server_name = options.string, min_version = options.one_of("1.2", "1.3"),
}

local new_options = {
  uri = options.string,
  user = options.string,
  password = options.either(options.string, options.callback),
  token = options.string,
  tls = options.table,
  timeout = options.seconds,
  max_body = options.integer(1, 2147483647),
  runtime = options.either(options.string, options.table),
}
management.options = new_options

-- ---- The address ------------------------------------------------------------------------------------

local function encode(text)
  return (text:gsub("[^%w%-%._~]", function(c) return ("%%%02X"):format(c:byte()) end))
end

local function decode(text)
  return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end

local function host_and_port(text, default)
  local host, port = text:match "^%[([%x:%.]+)%]:?(%d*)$"
  if not host then host, port = text:match "^([%w%.%-_]+):?(%d*)$" end
  if not host then return nil end
  port = port ~= "" and tonumber(port) or default
  if port < 1 or port > 65535 then return nil end
  return host, port
end

--- Takes an address of the API apart.
---@package
---@return table|nil parts { host, port, prefix, user, password, secure }
---@return string? problem   never quotes the address
function management.parse(text)
  local scheme, rest = text:match "^(%a+)://(.*)$"
  scheme = scheme and scheme:lower()
  if scheme ~= "http" and scheme ~= "https" then
    return nil, "the address of the management API must start with http:// or https://"
  end
  if rest:find "[%c ?#]" then
    return nil, "the address of the management API holds a space, a control character, a ? or a #: percent-encode it"
  end
  local authority, path = rest:match "^([^/]*)(.*)$"
  local userinfo, where = authority:match "^(.*)@([^@]*)$"
  local host, port = host_and_port(where or authority, scheme == "https" and 15671 or 15672)
  if not host then
    return nil, "the address of the management API has no valid host and port (is a character of the password not "
      .. "percent-encoded?)"
  end
  local user, password
  if userinfo then
    user, password = userinfo:match "^([^:]*):(.*)$"
    user = decode(user or userinfo)
    password = password and decode(password)
  end
  return {
    host = host, port = port, prefix = path:gsub("/+$", ""), user = user, password = password,
    secure = scheme == "https",
  }
end

--- A client of the management API of one node. Nothing is connected yet.
---@param opts string|moonrabbit.ManagementOptions  a URI stands for { uri = URI }
---@param level integer?   of the caller, for errors
---@return moonrabbit.Management
function management.new(opts, level)
  level = (level or 1) + 1
  if type(opts) == "string" then opts = { uri = opts } end
  opts = options.check("management", opts, new_options, level)
  if opts.tls then options.check("management: tls", opts.tls, tls_options, level) end
  local address, problem = management.parse(opts.uri or "http://localhost:15672")
  if not address then error("management: " .. problem, level) end
  if opts.tls and not address.secure then error("management: option 'tls' needs an https:// address", level) end
  local tls
  if address.secure then
    tls = { verify = true, server_name = address.host }
    for key, value in pairs(opts.tls or {}) do tls[key] = value end
  end
  local label = (address.host:find(":", 1, true) and "[" .. address.host .. "]" or address.host) .. ":" .. address.port
  return setmetatable({
    endpoint = label, timeout = opts.timeout or 10,
    _host = address.host, _port = address.port, _prefix = address.prefix, _tls = tls,
    _user = opts.user or address.user or "guest",
    _password = opts.password or address.password or "guest",
    _token = opts.token, _max_body = opts.max_body or 64 * 1024 * 1024,
    _runtime = runtimes.find(opts.runtime, level),
  }, Management)
end

-- ---- Requests ---------------------------------------------------------------------------------------

-- The header, and the secret in it; nil, err.
local function authorization(self)
  if self._token then return "Bearer " .. self._token, self._token end
  local password = self._password
  if type(password) == "function" then
    local problem
    password, problem = password()
    if type(password) ~= "string" then
      return nil, errors.new { kind = "auth", endpoint = self.endpoint, temporary = true,
        message = "the password function gave none" .. (problem and ": " .. tostring(problem) or "") }
    end
  end
  return "Basic " .. require "mime".b64(self._user .. ":" .. password), password
end

-- The reason that a refusal gives: { error, reason }, or { status, reason } of a health check.
local function reason_of(body)
  local answer = body ~= "" and json.decode(body)
  local text = answer and (answer.reason or answer.message or answer.error)
  if type(text) ~= "string" then return nil end
  return (text:gsub("%c", " "):sub(1, 500))
end

-- A broker may quote what it was sent: the URI of an upstream, or our own password.
local function without_secrets(self, text, own)
  if not text then return nil end
  text = text:gsub("://[^%s/]*@", "://***@")
  if #own > 3 and own ~= self._user then text = secret.without(text, own) end
  return text
end

local function refusal(self, code, what, body, own)
  local reason = without_secrets(self, reason_of(body or ""), own)
  local err = { kind = "http", code = code, endpoint = self.endpoint,
    temporary = code == 408 or code == 429 or code >= 500 }
  if code == 401 or code == 403 then -- RabbitMQ answers 401 also to a user who lacks a tag
    err.kind, err.message = "auth", what .. ": the management API refuses this to "
      .. (self._token and "the token" or "user '" .. self._user .. "'")
  elseif code == 404 then
    err.message = what .. ": there is no such thing"
  elseif code >= 300 and code < 400 then
    err.message = what .. ": the management API is elsewhere: redirects are not followed"
  else
    err.message = what .. ": the management API refuses"
  end
  err.message = ("%s (%d%s)"):format(err.message, code, reason and ": " .. reason or "")
  return errors.new(err)
end

local function query_text(query)
  if not query then return "" end
  local parts = {}
  for name, value in pairs(query) do parts[#parts + 1] = encode(name) .. "=" .. encode(tostring(value)) end
  table.sort(parts)
  return #parts > 0 and "?" .. table.concat(parts, "&") or ""
end

local function path_text(path)
  if type(path) == "string" then return path end
  local parts = {}
  for i, name in ipairs(path) do parts[i] = encode(tostring(name)) end
  return "/api/" .. table.concat(parts, "/")
end

---@class moonrabbit.ManagementRequestOptions
---@field query table<string, any>?  names to values, encoded here
---@field body string?               JSON
---@field headers table<string, string>?
---@field timeout number?            seconds; the client's by default

local request_options = {
  query = options.table, body = options.string, headers = options.table, timeout = options.seconds,
}

--- Any request: for what has no function of its own here.
---@param method string   "GET", "PUT", "POST", "DELETE"
---@param path string|string[]  "/api/…" as it goes on the wire, or a list of names below /api, encoded here
---@param opts moonrabbit.ManagementRequestOptions?
---@return string|nil body, moonrabbit.Error|integer err_or_code
function Management:request(method, path, opts)
  options.argument("Management:request", "method", method, options.string)
  options.argument("Management:request", "path", path, options.either(options.string, options.table))
  opts = options.check("Management:request", opts, request_options)
  local credentials, own = authorization(self)
  if not credentials then return nil, own end
  local headers = {
    ["host"] = self.endpoint, ["accept"] = "application/json, */*;q=0.1", ["connection"] = "close",
    ["user-agent"] = "moonrabbit", ["authorization"] = credentials,
  }
  local body = opts.body or (method ~= "GET" and method ~= "DELETE" and method ~= "HEAD") and "" or nil
  if body then
    headers["content-type"] = "application/json"
    headers["content-length"] = tostring(#body)
  end
  for name, value in pairs(opts.headers or {}) do headers[name:lower()] = tostring(value):gsub("%c", " ") end
  local target = self._prefix .. path_text(path)
  local code, answer, text = http.request {
    runtime = self._runtime, host = self._host, port = self._port, tls = self._tls, method = method,
    target = target .. query_text(opts.query), headers = headers, body = body,
    timeout = opts.timeout or self.timeout, max_body = self._max_body, label = self.endpoint,
  }
  if not code then return nil, answer end
  if code < 200 or code > 299 then return nil, refusal(self, code, method .. " " .. target, text, own) end
  return text, code
end

local function nonsense(self, method, path)
  return errors.new { kind = "protocol", endpoint = self.endpoint, temporary = false,
    message = ("%s %s: the answer is not what the management API of RabbitMQ answers"):format(method, path) }
end

--- GET of an object or a list.
---@package
---@param path string[]
---@param query table?
---@param shape "list"|"object"
---@return table|nil, moonrabbit.Error?
function Management:_get(path, query, shape)
  local body, err = self:request("GET", path, { query = query })
  if not body then return nil, err end
  local value = json.decode(body)
  if not value or (shape == "list" and next(value) ~= nil and value[1] == nil)
    or (shape == "object" and value[1] ~= nil) then
    return nil, nonsense(self, "GET", path_text(path))
  end
  if shape == "list" then
    for i = 1, #value do
      if type(value[i]) ~= "table" then return nil, nonsense(self, "GET", path_text(path)) end
    end
  end
  return value
end

local PAGE = 500

--- GET of a list that may be long, page by page.
---@package
function Management:_pages(path, query)
  local all, page = {}, 1
  query = query or {}
  query.page_size = PAGE
  repeat
    query.page = page
    local answer, err = self:_get(path, query, "object")
    if not answer then
      if page > 1 and err.code == 400 then break end -- the list has become shorter
      return nil, err
    end
    local items, pages = answer.items, answer.page_count
    if type(items) ~= "table" or type(pages) ~= "number" then return nil, nonsense(self, "GET", path_text(path)) end
    for _, item in ipairs(items) do
      if type(item) == "table" then all[#all + 1] = item end
    end
    page = page + 1
  until page > pages or #items == 0
  return all
end

--- A change: PUT, POST or DELETE.
---@package
---@param value any?   the body, as Lua values
---@param level integer?
---@return true|nil, moonrabbit.Error?
function Management:_change(method, path, value, opts, level)
  local body, problem
  if value ~= nil then
    body, problem = json.encode(value)
    if not body then error("management: the value cannot be sent as JSON: " .. problem, (level or 2) + 1) end
  end
  opts = opts or {}
  local answer, err = self:request(method, path, { body = body, headers = opts.headers, query = opts.query })
  if not answer then return nil, err end
  return true
end

function Management:__tostring()
  return ("%s (%s@%s)"):format(Management.__name, self._user, self.endpoint)
end

for _, name in ipairs { "broker", "queues", "policies", "access", "federation", "definitions" } do
  local part = require("moonrabbit.management." .. name)
  add_parts(Management, part)
end

management.Management = Management
management.compare = require("moonrabbit.management.differences").compare

return management
