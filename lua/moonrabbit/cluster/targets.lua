--- Targets: copies of them for other hosts, and services of DNS made into hosts.
-- @module moonrabbit.cluster.targets

local errors = require "moonrabbit.errors"
local resolver = require "moonrabbit.cluster.resolver"
local uri = require "moonrabbit.uri"

local targets = {}

--- What a target is known by: two of the same address and security are the same.
---@param target table
---@return string
function targets.key(target)
  return (target.tls and "tls " or "") .. uri.endpoint(target)
end

--- A target like another one, at another address.
---@param target table
---@param host string
---@param port integer
---@return table
function targets.at(target, host, port)
  local copy = {}
  for name, value in pairs(target) do copy[name] = value end
  copy.host, copy.port, copy.path, copy.srv = host, port, nil, nil
  if target.tls then
    copy.tls = {}
    for name, value in pairs(target.tls) do copy.tls[name] = value end
    -- A name that the user gave stays; one that was the host's becomes that of this host.
    if copy.tls.server_name == nil or copy.tls.server_name == target.host then copy.tls.server_name = host end
  end
  return copy
end

-- With TLS the host that DNS names must belong to the service's domain, or the user must say which name to expect:
-- else whoever answers for the DNS would be sent the password.
local function belongs(target, host)
  if not target.tls or target.tls.verify == false or target.tls.server_name ~= target.host then return true end
  local domain = target.srv:gsub("%.$", ""):match "^_[^.]+%._[^.]+%.(.+)$"
  host = host:lower()
  return domain ~= nil and (host == domain:lower() or host:sub(-#domain - 1) == "." .. domain:lower())
end

local function look_up(target, context)
  local found, text = resolver.srv(context.runtime, target.srv, context.dns)
  if not found then
    return nil, errors.new { kind = "dns", message = text, endpoint = target.srv, temporary = true }
  end
  local list = {}
  for _, where in ipairs(found) do
    if belongs(target, where.host) then list[#list + 1] = targets.at(target, where.host, where.port) end
  end
  if #list == 0 then
    return nil, errors.new { kind = "tls", endpoint = target.srv, temporary = false,
      message = ("the SRV records of %s name hosts outside its domain: set tls.server_name to the name that their "
        .. "certificates have"):format(target.srv) }
  end
  return list
end

--- The targets with every service replaced by its hosts. What cannot be looked up is left out, and the error tells why;
--- nil, err when nothing remains. May yield when there is a service.
---@param list table[]
---@param context { runtime: table, dns: table?, log: function }
---@return table[]|nil, moonrabbit.Error?
function targets.expand(list, context)
  local all, err = {}, nil
  for _, target in ipairs(list) do
    if target.srv then
      local found, problem = look_up(target, context)
      if not found then context.log("warn", problem.message) end
      if problem and not (err and err.temporary) then err = problem end
      for _, each in ipairs(found or {}) do all[#all + 1] = each end
    else
      all[#all + 1] = target
    end
  end
  if #all == 0 then return nil, err end
  return all, err
end

return targets
