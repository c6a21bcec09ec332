--- Cosockets as docs/internals.md describes transports.
--
-- A cosocket belongs to the handler (request or timer) that made it. One light thread may read it and
-- one write it; neither can be interrupted, and closing it while one of them waits fails. But a light thread can be
-- killed, by the one that started it. So each transport has two of its own: one reads ahead, and waits as long as it
-- takes; the other started it, waits until the transport is closed, and ends it then. Whoever wants bytes waits on a
-- condition, which anybody can end. So nothing has to wake up only to look.

local base = require "resty.core.base"
local ffi = require "ffi"
local semaphore = require "ngx.semaphore"

local get_request = base.get_request
local thread_spawn, thread_kill, exiting = ngx.thread.spawn, ngx.thread.kill, ngx.worker.exiting

local M = {}

---@class moonrabbit.resty.Transport
local Transport = { blind = true }
Transport.__index = Transport

-- As long as nginx's timers allow with some room: a read is ended by other means.
local LONG = 86400
local READ_TIMEOUT = LONG * 1000
local SEND_TIMEOUT = 60000
local CHUNK = 65536
-- So many bytes are read before anybody asks for them.
local AHEAD = 4 * CHUNK
-- nginx takes one of a name's addresses, by chance: a connect that fails is tried again so often.
local ATTEMPTS = 4

local max, min, floor = math.max, math.min, math.floor

local function ms(seconds) return max(1, min(2147483647, floor(seconds * 1000))) end

-- ---- Reading and writing ----------------------------------------------------------------------------

-- The light thread that reads; killed when the transport is closed.
local function read_ahead(self)
  local socket, chunks = self.socket, self.chunks
  while true do
    local bytes, err = socket:receiveany(CHUNK)
    if bytes then
      self.last = self.last + 1
      chunks[self.last] = bytes
      self.ahead = self.ahead + #bytes
      self.arrived:signal()
      while self.ahead >= AHEAD do self.taken:wait(LONG) end
    elseif err ~= "timeout" then
      self.failure = err == "closed" and "the broker closed the connection" or tostring(err)
      self.arrived:broadcast()
      return
    end
  end
end

-- The light thread that owns the reading one. What is being written is written first: a writer would never learn of
-- its socket's end. In a worker that leaves nobody minds, and a peer that takes nothing must not hold it up.
local function own(self)
  local reader = thread_spawn(read_ahead, self)
  while not self.closed or self.writing and not exiting() do self.over:wait(LONG) end
  thread_kill(reader)
  self.socket:close()
end

local function take(self)
  local first = self.first
  local bytes = self.chunks[first]
  if not bytes then return nil end
  self.chunks[first] = nil
  self.first = first + 1
  if self.ahead >= AHEAD and self.ahead - #bytes < AHEAD then self.taken:post(1) end
  self.ahead = self.ahead - #bytes
  return bytes
end

-- The next bytes that came, as soon as there are any.
local function receive(self, timeout)
  local now = self.now
  local deadline = timeout and now() + timeout
  while not self.closed do
    local bytes = take(self)
    if bytes then return bytes end
    if self.failure then return nil, "closed", self.failure end
    local left = deadline and deadline - now()
    if left and left <= 0 then return nil, "timeout", "nothing to read in time" end
    self.arrived:wait(left)
  end
  return nil, "closed", "closed"
end

-- What the last call left, else the next bytes; at most `most` of them.
local function next_bytes(self, most, timeout)
  local bytes = self.rest
  self.rest = nil
  if not bytes then
    local kind, text
    bytes, kind, text = receive(self, timeout)
    if not bytes then return nil, kind, text end
  end
  if #bytes > most then bytes, self.rest = bytes:sub(1, most), bytes:sub(most + 1) end
  return bytes
end

--- Waits for bytes and gives them to the engine.
---@return integer|nil n, string? kind, string? text
function Transport:fill(engine)
  local bytes = self.rest
  if not bytes then
    local kind, text
    bytes, kind, text = receive(self)
    if not bytes then return nil, kind, text end
  end
  local taken = engine:feed(bytes, self.now())
  self.rest = taken < #bytes and bytes:sub(taken + 1) or nil
  if taken == 0 then return nil, "full" end
  return taken
end

--- Some bytes, as soon as there are any. At the end: nil, "closed".
---@param most integer? bytes
---@param timeout number? seconds
---@return string|nil bytes, string? kind, string? text
function Transport:read(most, timeout) return next_bytes(self, most or CHUNK, timeout) end

--- Writes all the bytes.
---@param bytes string
---@param timeout number? seconds; what was not written in time leaves the socket unusable
---@return boolean|nil ok, string? kind, string? text
function Transport:write(bytes, timeout)
  if self.closed then return nil, "closed", "closed" end
  local send_timeout = timeout and ms(timeout) or SEND_TIMEOUT
  if send_timeout ~= self.send_timeout then
    self.send_timeout = send_timeout
    self.socket:settimeouts(SEND_TIMEOUT, send_timeout, READ_TIMEOUT)
  end
  self.writing = true
  local sent, err = self.socket:send(bytes)
  self.writing = false
  if self.closed then self.over:post(1) end
  if sent then return true end
  if err == "timeout" then return nil, "timeout", "the peer does not read in time" end
  return nil, "closed", err
end

--- Writes everything that the engine has to write.
---@return boolean|nil ok, string? kind, string? text
function Transport:flush(engine)
  while true do
    local bytes = engine:drain(self.now(), CHUNK)
    if bytes == "" then return true end
    local ok, kind, text = self:write(bytes)
    if not ok then return nil, kind, text end
  end
end

--- A cosocket cannot write without maybe waiting.
function Transport:try_flush() return nil, "again" end -- luacheck: ignore 212

--- nginx does not tell.
function Transport:tls_info() return self.secure and "TLS" or nil end

--- Throws in any handler but the one that opened it.
function Transport:check_owner()
  if self.request ~= get_request() then
    error("this connection belongs to another request or timer of nginx: each needs one of its own"
      .. " (or moonrabbit.resty's publish, call and run, which are for all)", 0)
  end
end

--- Idempotent; whoever reads on it gets nil, "closed".
function Transport:close()
  if self.closed then return end
  self.closed = true
  self.arrived:broadcast()
  self.over:post(1)
end

-- ---- TLS --------------------------------------------------------------------------------------------

local directives = {
  ca = "lua_ssl_trusted_certificate (and lua_ssl_verify_depth)",
  min_version = "lua_ssl_protocols",
}

local parsed = {} -- file -> what nginx made of it: they are read once a worker

local function pem(what, path, parse)
  local known = parsed[path]
  if known then return known end
  local file, problem = io.open(path, "rb")
  if not file then return nil, ("tls.%s: %s"):format(what, problem) end
  local text = file:read "*a"
  file:close()
  local made
  made, problem = parse(text)
  if not made then return nil, ("tls.%s: %s: %s"):format(what, path, tostring(problem)) end
  parsed[path] = made
  return made
end

--- Throws for options that only nginx's own configuration can set, and reads the client certificate: files
--- are read here, once a worker, and not when a connection is made.
---@param tls table
---@return table|nil identity { certificate, key }, false: none; string? problem
function M.prepare(tls)
  for option, directive in pairs(directives) do
    if tls[option] then
      error("option 'tls." .. option .. "' has no effect in nginx: use its directive " .. directive, 0)
    end
  end
  if not tls.cert and not tls.key then return false end
  if not tls.cert or not tls.key then error("options 'tls.cert' and 'tls.key' go together", 0) end
  local ssl = require "ngx.ssl"
  local certificate, problem = pem("cert", tls.cert, ssl.parse_pem_cert)
  if not certificate then return nil, problem end
  local key
  key, problem = pem("key", tls.key, ssl.parse_pem_priv_key)
  if not key then return nil, problem end
  return { certificate, key }
end

local function explain(err)
  err = tostring(err)
  if err:find("issuer certificate", 1, true) or err:find("self.signed") or err:find("depth", 1, true) then
    return err .. " (nginx trusts what lua_ssl_trusted_certificate names, down to lua_ssl_verify_depth)"
  end
  return err
end

-- No session is wanted back, but to say so (false) will not do: without lua-nginx-module's #2506 a handshake that is over
-- at once, with no wait for the peer, is then taken for a good one, whatever was found about the certificate (the
-- connection is closed, and nobody knows why). Else it looks, and throws an assertion; the error is in resty.core's buffer.
local function handshake(socket, tls)
  local whole, session, err = pcall(socket.sslhandshake, socket, nil, tls.server_name, tls.verify ~= false)
  if not whole then
    local found = tostring(session):find("assertion failed", 1, true) and base.get_errmsg_ptr()[0]
    return nil, found and found ~= nil and ffi.string(found) or session
  end
  return session and true, err
end

local function secure(socket, tls, identity)
  if identity then
    if not socket.setclientcert then
      error("option 'tls.cert': this ngx_lua has no client certificates; 0.10.22 and later do", 0)
    end
    local ok, problem = socket:setclientcert(identity[1], identity[2])
    if not ok then return nil, "tls", "tls.cert: " .. tostring(problem), false end
  end
  local ok, err = handshake(socket, tls)
  if ok then return true end
  if err == "timeout" then return nil, "timeout", "no answer in time (TLS handshake)", true end
  if err == "closed" then return nil, "closed", "the TLS handshake was cut short", true end
  return nil, "tls", "the TLS handshake failed: " .. explain(err), false
end

-- ---- Connecting -------------------------------------------------------------------------------------

local function describe(endpoint)
  if endpoint.path then return "unix:" .. endpoint.path end
  local host = endpoint.host
  return (host:find(":", 1, true) and "[" .. host .. "]" or host) .. ":" .. endpoint.port
end

local function kind_of(err)
  if err == "timeout" then return "timeout", true, "no answer in time" end
  if err:find("no resolver defined", 1, true) then
    return "dns", false, err .. ": nginx looks names up by its own directive `resolver` alone (or give an address)"
  end
  if err:find("resolve", 1, true) then return "dns", true, err end
  if err:find("refused", 1, true) or err:lower():find("no such file", 1, true) then return "refused", true, err end
  return "closed", true, err
end

local function is_address(host) return host:find ":" or host:find "^%d+%.%d+%.%d+%.%d+$" end

-- What to connect to, in turn. nginx asks no hosts file, and tells none of a name's addresses.
local function addresses(endpoint)
  if endpoint.path then return { "unix:" .. endpoint.path } end
  local host = endpoint.host
  if host == "localhost" then return { "127.0.0.1", "[::1]" } end
  if host:find(":", 1, true) then return { "[" .. host .. "]" } end
  local list = {}
  for i = 1, is_address(host) and 1 or ATTEMPTS do list[i] = host end
  return list
end

-- A connected cosocket.
local function connect(endpoint, deadline, now)
  local list = addresses(endpoint)
  local kind, temporary, text
  for i, address in ipairs(list) do
    local left = deadline - now()
    if left <= 0 then
      if not kind then kind, temporary, text = kind_of "timeout" end
      break
    end
    local socket = ngx.socket.tcp()
    local share = ms(left / (#list - i + 1))
    socket:settimeouts(share, SEND_TIMEOUT, share)
    local ok, err
    if endpoint.path then ok, err = socket:connect(address) else ok, err = socket:connect(address, endpoint.port) end
    if ok then return socket end
    local why, again, said = kind_of(tostring(err))
    -- Of two failures the one that came farther says what is wrong.
    if not kind or kind == "refused" then kind, temporary, text = why, again, said end
    if why == "dns" then break end
  end
  return nil, kind, ("cannot connect to %s: %s"):format(describe(endpoint), text), temporary
end

--- See docs/internals.md.
---@param runtime table the resty runtime
---@return moonrabbit.resty.Transport|nil, string? kind, string? text, boolean? temporary
function M.open(runtime, endpoint, tls, timeout)
  local now = runtime.now
  local deadline = now() + (timeout or 60)
  local identity, problem
  if tls then
    identity, problem = M.prepare(tls)
    if identity == nil then return nil, "tls", problem, false end
  end
  local socket, kind, text, temporary = connect(endpoint, deadline, now)
  if not socket then return nil, kind, text, temporary end
  if tls then
    local rest = ms(deadline - now())
    socket:settimeouts(rest, rest, rest)
    local ok
    ok, kind, text, temporary = secure(socket, tls, identity)
    if not ok then
      socket:close()
      return nil, kind, text, temporary
    end
  end
  socket:settimeouts(SEND_TIMEOUT, SEND_TIMEOUT, READ_TIMEOUT)
  local self = setmetatable({
    socket = socket, secure = tls ~= nil, request = get_request(), now = now,
    chunks = {}, first = 1, last = 0, ahead = 0, -- what was read and not taken yet
    arrived = runtime.condition(), taken = semaphore.new(), over = semaphore.new(),
    closed = false, writing = false, send_timeout = SEND_TIMEOUT,
  }, Transport)
  thread_spawn(own, self)
  return self
end

return M
