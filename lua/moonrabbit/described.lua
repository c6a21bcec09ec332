--- What was thrown, in words, whatever it is: a user's error object may have a `__tostring` that throws itself, or
--- returns no string.
-- @module moonrabbit.described

---@param err any
---@return string
return function(err)
  if type(err) == "string" then return err end
  local ok, text = pcall(tostring, err)
  if ok and type(text) == "string" then return text end
  return ("(an error object, a %s, whose __tostring fails: %s)"):format(type(err),
    ok and "it returns no string" or type(text) == "string" and text or "a " .. type(text))
end
