--- What differs between the definitions of two brokers.
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument = options.argument

local management = {}

-- What an entry is known by, in each section.
local identities = {
  users = { "name" },
  vhosts = { "name" },
  permissions = { "vhost", "user" },
  topic_permissions = { "vhost", "user", "exchange" },
  parameters = { "vhost", "component", "name" },
  global_parameters = { "name" },
  policies = { "vhost", "name" },
  queues = { "vhost", "name" },
  exchanges = { "vhost", "name" },
  bindings = { "vhost", "source", "destination_type", "destination", "routing_key", "arguments" },
}

local sections = {
  "vhosts", "users", "permissions", "topic_permissions", "parameters", "global_parameters", "policies", "exchanges",
  "queues", "bindings",
}

-- Each cluster has its own.
local own = { cluster_name = true, internal_cluster_id = true }

-- A value as text, the same for equal values.
local function canonical(value)
  if type(value) ~= "table" then return tostring(value) end
  local keys = {}
  for key in pairs(value) do keys[#keys + 1] = key end
  table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
  for i, key in ipairs(keys) do keys[i] = tostring(key) .. "=" .. canonical(value[key]) end
  return "{" .. table.concat(keys, ",") .. "}"
end

local function index(list, fields)
  local by_identity = {}
  for _, entry in ipairs(type(list) == "table" and list or {}) do
    if type(entry) == "table" then
      local parts = {}
      for i, field in ipairs(fields) do parts[i] = canonical(entry[field]) end
      by_identity[table.concat(parts, "\0")] = entry
    end
  end
  return by_identity
end

-- The names of the fields of `wanted` that `there` has otherwise, sorted.
local function differing(wanted, there)
  local fields = {}
  for field, value in pairs(wanted) do
    if canonical(value) ~= canonical(there[field]) then fields[#fields + 1] = field end
  end
  table.sort(fields)
  return fields
end

local function title(section, entry)
  if section == "bindings" then
    return ("%s -> %s %s (%s)"):format(tostring(entry.source), tostring(entry.destination_type),
      tostring(entry.destination), tostring(entry.routing_key))
  elseif section == "permissions" or section == "topic_permissions" then
    return tostring(entry.user) .. (entry.exchange and " " .. tostring(entry.exchange) or "")
  elseif section == "parameters" then
    return tostring(entry.component) .. " " .. tostring(entry.name)
  end
  return tostring(entry.name)
end

---@class moonrabbit.DefinitionDifference
---@field section string     "queues", "bindings", …
---@field vhost string?
---@field name string        of the entry, for people
---@field status "missing"|"extra"|"different"
---@field fields string[]?   of "different": which fields

local function compare_section(section, wanted, there, found)
  local fields = identities[section]
  local a, b = index(wanted, fields), index(there, fields)
  local function add(status, entry, differences)
    found[#found + 1] = {
      section = section, vhost = entry.vhost, name = title(section, entry), status = status, fields = differences,
    }
  end
  for key, entry in pairs(a) do
    if not (section == "global_parameters" and own[entry.name]) then
      if not b[key] then
        add("missing", entry)
      else
        local differences = differing(entry, b[key])
        if #differences > 0 then add("different", entry, differences) end
      end
    end
  end
  for key, entry in pairs(b) do
    if not a[key] and not (section == "global_parameters" and own[entry.name]) then add("extra", entry) end
  end
end

--- What differs between two definitions: those wanted (of the primary) and those there (of the standby). The names of
--- differing fields are told, never their values: some are secrets. Names and ids of clusters don't count, nor the
--- versions of the brokers.
---@param wanted table
---@param there table
---@return moonrabbit.DefinitionDifference[]   empty: the same
function management.compare(wanted, there)
  argument("management.compare", "wanted", wanted, options.table)
  argument("management.compare", "there", there, options.table)
  local found = {}
  for at, section in ipairs(sections) do
    local from = #found + 1
    compare_section(section, wanted[section], there[section], found)
    for i = from, #found do found[i].at = at end
  end
  table.sort(found, function(a, b)
    if a.at ~= b.at then return a.at < b.at end
    if a.vhost ~= b.vhost then return tostring(a.vhost) < tostring(b.vhost) end
    if a.name ~= b.name then return a.name < b.name end
    return a.status < b.status
  end)
  for _, difference in ipairs(found) do difference.at = nil end
  return found
end

return management
