--- Throws for seconds to wait that are none.
---@param what string who is to wait
---@param seconds any
---@param level integer of whoever asked, for error()
return function(what, seconds, level)
  if type(seconds) == "number" and seconds == seconds then return end
  error(("%s: seconds must be a number, not %s"):format(what,
    type(seconds) == "number" and "NaN" or "a " .. type(seconds)), level + 1)
end
