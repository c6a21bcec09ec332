--- A de-duplication store in Redis: one for all processes and machines that share it.
--
--     dedupe = mr.dedupe.redis { url = "redis://:secret@127.0.0.1:6379/0", ttl = 86400 }
--
-- A claim is `SET key token NX PX lease`, so its owner's death ends it; a commit sets the key for `ttl`; an abort deletes
-- the key only where it is still this claim's (a script, run by Redis in one piece). Keys that Redis evicts
-- (`maxmemory-policy`) are forgotten: give what must be remembered a Redis of its own, with `noeviction`.
--
-- It speaks through redis-lua over the connections of the runtime, so nothing blocks; in nginx through lua-resty-redis.
-- At most `connections` commands are on their way at once, the others wait in line.
-- @module moonrabbit.app.dedupe.redis

local options = require "moonrabbit.options"
local random = require "moonrabbit.random"

local redis = {}

---@class moonrabbit.dedupe.Redis
local Store = {}
Store.__index = Store

local DONE = "done"
-- Deletes a claim if it is still the caller's.
local RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"
-- A claim may end between two looks at it.
local TRIES = 3
-- Claims without an answer that are remembered; past that all are forgotten, and end with their leases.
local MOST_UNSURE = 10000

---@class moonrabbit.dedupe.RedisOptions
---@field url string?       `redis[s]://[user:password@]host[:port][/database]`; "redis://127.0.0.1:6379/0" by default
---@field path string?      of a unix socket, instead of the URL's host and port
---@field password (string|fun(): string)?  over the URL's
---@field user string?      over the URL's
---@field ttl number?       seconds that a key is remembered after its commit; 86,400 by default
---@field prefix string?    before each key; "moonrabbit:" by default
---@field timeout number?   seconds for a command, connecting included; 5 by default
---@field connections integer?  8 by default
---@field tls table?        the options of `moonrabbit.connect`; for `rediss://`

local store_options = {
  url = options.string, path = options.string, password = options.either(options.string, options.callback),
  user = options.string, ttl = options.seconds, prefix = options.string, timeout = options.seconds,
  connections = options.integer(1, 1024), tls = options.table,
}

local function decode(text)
  return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end

local function parse(url)
  local scheme, rest = url:match "^(rediss?)://(.*)$"
  if not scheme then return nil, "it must begin with redis:// or rediss://" end
  local userinfo, address = rest:match "^(.*)@(.*)$"
  local host_port, database = (address or rest):match "^([^/]*)/?(.*)$"
  local host, port = host_port:match "^%[(.-)%]:?(%d*)$"
  if not host then host, port = host_port:match "^([^:]*):?(%d*)$" end
  if not host then return nil, "the host is not readable" end
  if database ~= "" and not database:match "^%d+$" then return nil, "the database must be a number" end
  local user, password
  if userinfo then user, password = userinfo:match "^([^:]*):?(.*)$" end
  return {
    secure = scheme == "rediss", host = host ~= "" and decode(host) or "127.0.0.1", port = tonumber(port) or 6379,
    database = tonumber(database) or 0,
    user = user and user ~= "" and decode(user) or nil,
    password = password and password ~= "" and decode(password) or nil,
  }
end

local function check_tls(opts, server, level)
  if opts.tls and not server.secure then
    error("dedupe.redis: option 'tls' needs a URL that starts with rediss://", level + 1)
  end
  if opts.path and server.secure then
    error("dedupe.redis: option 'path': there is no TLS over a unix socket, so no rediss://", level + 1)
  end
  if opts.tls then
    options.check("dedupe.redis: tls", opts.tls, require("moonrabbit.connection.options").tls, level + 1)
  end
end

--- Makes one; nothing is connected yet.
---@param opts moonrabbit.dedupe.RedisOptions?
---@param level integer?
---@return moonrabbit.dedupe.Redis
function redis.new(opts, level)
  level = (level or 1) + 1
  opts = options.check("dedupe.redis", opts, store_options, level)
  local server, problem = parse(opts.url or "redis://")
  if not server then error("dedupe.redis: option 'url': " .. problem, level) end
  if opts.ttl == 0 then error("dedupe.redis: option 'ttl' must be more than 0", level) end
  check_tls(opts, server, level)
  server.path, server.user = opts.path, opts.user or server.user
  if opts.password ~= nil then server.password = opts.password end
  if server.secure then
    server.tls = { verify = true }
    for key, value in pairs(opts.tls or {}) do server.tls[key] = value end
  end
  server.timeout = opts.timeout or 5
  server.label = server.path and "unix:" .. server.path or ("%s:%d"):format(server.host, server.port)
  return setmetatable({
    server = server, ttl = opts.ttl or 86400, prefix = opts.prefix or "moonrabbit:",
    connections = opts.connections or 8, tokens = {}, serial = 0,
    unsure = {}, how_many_unsure = 0, -- key -> tokens of claims that Redis did not answer to, as a set
  }, Store)
end

-- What lua-resty-redis cannot be told.
local not_in_nginx = {
  ca = "nginx's directive lua_ssl_trusted_certificate", min_version = "nginx's directive lua_ssl_protocols",
  cert = "a Redis that asks for none", key = "a Redis that asks for none",
}

--- Takes the runtime that it is to connect by; called by the app.
---@package
function Store:attach(runtime)
  if self.clients then return end
  for name, instead in pairs(runtime.name == "resty" and not_in_nginx or {}) do
    if (self.server.tls or {})[name] then
      error(("dedupe.redis: option 'tls.%s' has no effect in nginx: use %s"):format(name, instead), 0)
    end
  end
  local Clients = require "moonrabbit.app.dedupe.redis_clients"
  self.clients = Clients.new(self.server, runtime, self.connections)
end

local function clients(self)
  if not self.clients then self:attach(require("moonrabbit.runtime").find("native", 4)) end
  return self.clients
end

local function milliseconds(seconds) return tostring(math.max(1, math.floor(seconds * 1000 + 0.5))) end

-- Unlike any other claim's, of whatever process.
local function new_token(self)
  self.serial = self.serial + 1
  self.identity = self.identity or random.hex(12)
  return "claim:" .. self.identity .. ":" .. self.serial
end

-- A claim that had no answer may have come through, and would else be somebody else's until its lease ends. Several
-- tasks may have tried: whose claim it was does not matter, as long as one of them has it.
local function remember_unsure(self, key, token)
  if self.how_many_unsure >= MOST_UNSURE then self.unsure, self.how_many_unsure = {}, 0 end
  local tokens = self.unsure[key] or {}
  tokens[token], self.unsure[key] = true, tokens
  self.how_many_unsure = self.how_many_unsure + 1
end

-- Takes a token out of those without an answer: this one, or any.
local function take_unsure(self, key, token)
  local tokens = self.unsure[key]
  if not tokens then return nil end
  token = token or next(tokens)
  if not token or not tokens[token] then return nil end
  tokens[token] = nil
  if next(tokens) == nil then self.unsure[key] = nil end
  return token
end

local function unanswered(self, key, token, err)
  remember_unsure(self, key, token)
  return nil, err
end

--- Claims a key for `lease` seconds: "new", "running" or "done".
---@param key string
---@param lease number seconds
---@return "new"|"running"|"done"|nil state, moonrabbit.Error?
function Store:begin(key, lease)
  local name, token = self.prefix .. key, take_unsure(self, key) or new_token(self)
  for _ = 1, TRIES do
    local ok, set = clients(self):command("set", name, token, "NX", "PX", milliseconds(lease))
    if not ok then return unanswered(self, key, token, set) end
    local got, value = true, set and token
    if not set then got, value = clients(self):command("get", name) end
    if not got then return unanswered(self, key, token, value) end
    if value and (value == token or take_unsure(self, key, value)) then
      self.tokens[key] = value
      return "new"
    end
    if value then return value == DONE and "done" or "running" end
  end
  return "running"
end

--- Remembers a key as done, for `ttl` seconds.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:commit(key)
  local ok, err = clients(self):command("set", self.prefix .. key, DONE, "PX", milliseconds(self.ttl))
  if not ok then return nil, err end
  self.tokens[key], self.unsure[key] = nil, nil
  return true
end

--- Gives a claim back. One that has ended, and is somebody else's now, is left alone.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:abort(key)
  local token = self.tokens[key]
  if not token then return true end
  local ok, err = clients(self):command("eval", RELEASE, "1", self.prefix .. key, token)
  if not ok then return nil, err end
  self.tokens[key] = nil
  return true
end

--- Closes its connections.
function Store:close()
  if self.clients then self.clients:close() end
end

return redis
