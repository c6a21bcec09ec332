--- Names looked up by cqueues.dns, where the runtime's field `dns` asks for it: IPv6 addresses, then IPv4.
-- @module moonrabbit.runtime.cqueues.names

local cqueues = require "cqueues"
local errno = require "cqueues.errno"
local now = require("moonrabbit.net").now
local protect = require("moonrabbit.runtime.pcall").pcall

local TYPES = { "AAAA", "A" }

local function addresses_of(name, kind, deadline)
  local dns, packet_of = require "cqueues.dns", require "cqueues.dns.packet"
  local packet, why = dns.query(name, kind, "IN", deadline and math.max(0, deadline - now()))
  if not packet then return nil, type(why) == "number" and errno.strerror(why) or tostring(why) end
  local list = {}
  for record in packet:grep { section = "ANSWER", type = kind } do list[#list + 1] = record:addr() end
  local code = packet:flags().rcode
  return list, code ~= 0 and (packet_of.rcode[code] or "code " .. code) or nil
end

-- Both kinds of addresses; a failure of one is none when the other is there.
local function look_up(name, deadline)
  local all, problem = {}, nil
  for _, kind in ipairs(TYPES) do
    local list, why = addresses_of(name, kind, deadline)
    for _, text in ipairs(list or {}) do all[#all + 1] = text end
    problem = why or problem
  end
  return #all == 0 and problem and "cqueues.dns: " .. problem or nil, all
end

local function nothing() end

--- See shared/names.lua. It waits in the way of cqueues, so in a coroutine of its own, which ends by its deadline.
return function(name, deadline, answer)
  local function ask()
    local ok, err, texts = protect(look_up, name, deadline)
    if ok then answer(err, texts) else answer("cqueues.dns: " .. tostring(err)) end
  end
  cqueues.running():wrap(ask)
  return nothing
end
