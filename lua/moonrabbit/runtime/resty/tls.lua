--- TLS of cosockets: what nginx's own configuration does not say, and what it found out.

local base = require "resty.core.base"
local ffi = require "ffi"

local M = {}

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

--- Makes a connected cosocket a secure one.
---@param tls table
---@param identity table|false of `prepare`
---@return boolean|nil ok, string? kind, string? text, boolean? temporary
function M.secure(socket, tls, identity)
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

return M
