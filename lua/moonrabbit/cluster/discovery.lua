--- What the management API says about a cluster, made into nodes and addresses. Nothing that it says is trusted to be
-- of the right type.
-- @module moonrabbit.cluster.discovery

local discovery = {}

local wildcards = { ["::"] = true, ["0.0.0.0"] = true }
local protocols = { amqp = "plain", ["amqp/ssl"] = "tls", http = "http", https = "https" }

local function is_loopback(host)
  return host == "localhost" or host == "::1" or host:find "^127%.%d+%.%d+%.%d+$" ~= nil
end
discovery.is_loopback = is_loopback

local function is_port(port)
  return type(port) == "number" and port >= 1 and port <= 65535 and port == math.floor(port)
end

local function is_host(host)
  return type(host) == "string" and #host > 0 and #host <= 255 and not host:find "[^%w%.%-_:]"
end

-- The host of "rabbit@host".
local function host_of(node)
  local host = node:match "@(.+)$"
  return is_host(host) and host or nil
end

-- The address of a listener: the node's host where it listens everywhere, or with TLS, whose certificates have names.
local function address(listener, kind, asked)
  local ip = listener.ip_address
  local host = host_of(listener.node)
  if not is_host(ip) or wildcards[ip] or kind == "tls" or kind == "https" then return host end
  -- A node that listens on its own loopback is for clients on its own machine: those who asked there.
  if is_loopback(ip) and not is_loopback(asked) then return nil end
  return ip
end

--- The nodes of a cluster from `overview` and `nodes`: name -> { name, running, addresses = { plain, tls, http, https } },
--- each address { host, port }.
---@param overview table
---@param nodes table[]
---@param asked string    the host of the API that said so
---@param choose (fun(node: string, listener: table): string|nil, integer?)?  the user's own idea of an address
---@return table<string, table>
function discovery.nodes(overview, nodes, asked, choose)
  local found = {}
  for _, node in ipairs(nodes) do
    if type(node.name) == "string" then
      found[node.name] = { name = node.name, running = node.running == true, addresses = {} }
    end
  end
  for _, listener in ipairs(type(overview.listeners) == "table" and overview.listeners or {}) do
    local kind = type(listener) == "table" and protocols[listener.protocol]
    local node = kind and type(listener.node) == "string" and found[listener.node]
    if node and is_port(listener.port) then
      local host, port
      if choose then host, port = choose(listener.node, listener) else host = address(listener, kind, asked) end
      port = port or listener.port
      local known = node.addresses[kind]
      -- Of several the IPv4 one: names of the other are for those who list it.
      if is_host(host) and is_port(port) and (not known or known.host:find(":", 1, true)) then
        node.addresses[kind] = { host = host, port = port }
      end
    end
  end
  return found
end

--- Whether a target is an address.
---@param target table
---@param where { host: string, port: integer }?
---@param node string   its name
---@return boolean
function discovery.same(target, where, node)
  if not where or not target.host or target.port ~= where.port then return false end
  if target.host == where.host then return true end
  if is_loopback(target.host) and is_loopback(where.host) then return true end
  local host = host_of(node)
  if not host then return false end
  -- "rabbit-1" and "rabbit-1.example.com" with the same port
  return target.host == host or target.host:match "^[^.]+" == host:match "^[^.]+" and host:find "^%a" ~= nil
    and (target.host:sub(1, #host + 1) == host .. "." or host:sub(1, #target.host + 1) == target.host .. ".")
end

return discovery
